from serving_fixtures import client, job_file, served, spec, tokenizer_path

__all__ = ["client", "job_file", "served", "spec", "tokenizer_path"]
