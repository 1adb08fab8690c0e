from serving_fixtures import tokenizer_path

__all__ = ["tokenizer_path"]
