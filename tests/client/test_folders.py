"""An adapter's folder appears complete or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.numpy
from serving import ROWS, Served

from cola_runtime.adapters.adapter_files import adapter_folder, read_adapter_folder
from cola_runtime.client.folders import new_folder
from cola_runtime.client.sdk import Client
from cola_runtime.errors import Conflict, InvalidInput, NotFound, ProtocolError
from cola_runtime.spec import JobSpec


def test_the_newest_checkpoint_is_downloaded_as_the_peft_folder_of_its_weights(
    client: Client, spec: JobSpec, served: Served, tmp_path: Path
) -> None:
    handle = client.submit(spec, training=ROWS)
    served.train(handle.job_id, steps=1)
    first = served.checkpoint(handle.job_id)
    served.train(handle.job_id, steps=1)
    second = served.checkpoint(handle.job_id)
    for path, version, content in ((tmp_path / "a", None, second), (tmp_path / "b", 1, first)):
        assert handle.download_adapter(path, version=version) == path
        files = {file.name: file.read_bytes() for file in path.iterdir()}
        assert files == adapter_folder(content.definition.spec, content.weights, "tiny-llama")
        read = read_adapter_folder(files, content.definition.spec.sites).weights
        assert all((read[key] == weight).all() for key, weight in content.weights.items())
    assert [checkpoint.version for checkpoint in handle.checkpoints()] == [1, 2]
    assert safetensors.numpy.load((tmp_path / "a/adapter_model.safetensors").read_bytes())


def test_without_a_checkpoint_nothing_is_written(client: Client, spec: JobSpec, tmp_path: Path) -> None:
    handle = client.submit(spec, training=ROWS)
    with pytest.raises(Conflict) as caught:
        handle.download_adapter(tmp_path / "adapter")
    assert caught.value.reason == "ADAPTER_NOT_READY"
    assert list(tmp_path.glob("*adapter*")) == []


def test_an_unknown_version_names_those_that_are_there(
    client: Client, spec: JobSpec, served: Served, tmp_path: Path
) -> None:
    handle = client.submit(spec, training=ROWS)
    served.train(handle.job_id, steps=3)
    served.checkpoint(handle.job_id)
    with pytest.raises(NotFound, match="It has: 3"):
        handle.download_adapter(tmp_path / "adapter", version=2)


def test_an_existing_folder_is_replaced_only_on_request(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(Conflict, match="overwrite"), new_folder(target) as folder:
        folder.append("new", b"new")
    with new_folder(target, overwrite=True) as folder:
        folder.append("new", b"ne")
        folder.append("new", b"w")
    assert {file.name: file.read_text() for file in target.iterdir()} == {"new": "new"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_in_the_middle_leaves_the_old_folder_and_no_remains(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    target.mkdir()
    (target / "old").write_text("old")

    def fail_in_the_middle() -> None:
        with new_folder(target, overwrite=True) as folder:
            folder.append("new", b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_in_the_middle()
    assert [file.name for file in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/x", "", ".", "..", "a\\b", "a\0b"])
def test_a_name_from_the_network_never_leaves_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ProtocolError), new_folder(tmp_path / "adapter") as folder:
        folder.append(name, b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="cannot write"), new_folder(tmp_path / "file" / "adapter"):
        pass
