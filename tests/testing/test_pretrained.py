import threading
from pathlib import Path

import pytest

from cola_runtime.base_model import pretrained
from cola_runtime.errors import NotFound, Unavailable


def test_a_local_folder_with_a_config_is_itself(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert pretrained.resolve_base_model(str(tmp_path), tmp_path / "cache") == tmp_path


@pytest.mark.parametrize("name", ["smollm2", "HuggingFaceTB/SmolLM2-135M", "/no/such/folder", "."])
def test_anything_else_is_unknown_and_the_allowed_names_are_listed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match="smollm2-135m-instruct") as caught:
        pretrained.resolve_base_model(name, tmp_path / "cache")
    assert caught.value.reason == "BASE_MODEL_UNKNOWN"


def test_a_missing_package_names_the_remedy_and_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "SMOLLM2_PACKAGE", "no_such_package_here")
    with pytest.raises(Unavailable, match=r"no_such_package_here.*make setup"):
        pretrained.prepare_smollm2(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_package_without_the_file_names_the_file():
    with pytest.raises(Unavailable, match=r"holds no weights\.gguf.*make setup"):
        pretrained.packaged_file("cola_runtime", "weights.gguf")


def test_a_package_that_is_not_there_has_its_reason():
    with pytest.raises(Unavailable) as caught:
        pretrained.packaged_file("no_such_package_here", "weights.gguf")
    assert (caught.value.reason, caught.value.remedy) == ("BASE_MODEL_NOT_INSTALLED", "Run `make setup`.")


def test_the_package_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "explosive_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"x")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert pretrained.packaged_file("explosive_package", "model.gguf") == package / "model.gguf"


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path):
    def fill(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        pretrained.publish_folder(tmp_path / "model", fill)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_error_is_not_mistaken_for_a_lost_race(tmp_path):
    def fill(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        pretrained.publish_folder(tmp_path / "model", fill)


def test_of_two_at_the_same_time_one_wins_and_both_see_a_whole_folder(tmp_path):
    meet = threading.Barrier(2, timeout=10)
    target = tmp_path / "model"
    seen = []

    def publish(name: str) -> None:
        def fill(folder: Path) -> None:
            (folder / "first").write_text(name)
            meet.wait()
            (folder / "second").write_text(name)

        pretrained.publish_folder(target, fill)
        seen.append(((target / "first").read_text(), (target / "second").read_text()))

    threads = [threading.Thread(target=publish, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert seen[0][0] == seen[0][1]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.pretrained
def test_smollm2_is_converted_once_quietly_and_knows_the_capital_of_france(capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        pretrained.packaged_file(pretrained.SMOLLM2_PACKAGE, pretrained.SMOLLM2_FILE)
    except Unavailable as error:
        pytest.skip(str(error))
    cache = Path(__file__).parents[2] / ".cache" / "models"  # kept between runs: the conversion takes 30 s
    capfd.readouterr()
    folder = pretrained.resolve_base_model(pretrained.SMOLLM2, cache)
    assert capfd.readouterr() == ("", "")
    assert pretrained.prepare_smollm2(cache) == folder

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert str(model.dtype) == "torch.bfloat16"
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model(**prompt).logits[0, -1].argmax())
    assert answer.strip() == "Paris"
    assert tokenizer.chat_template
