import json
import struct

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from transformers import AutoModelForCausalLM

from cola_runtime.adapter_spec import lora_spec
from cola_runtime.adapters.folder_files import CONFIG_FILE, WEIGHTS_FILE
from cola_runtime.adapters.peft_files import peft_folder, read_peft_folder
from cola_runtime.adapters.targets import resolve_target_sites
from cola_runtime.errors import InvalidInput
from cola_runtime.testing.tiny_models import save_tiny_model, tiny_sites
from cola_runtime.types import TensorKey, TensorKind

torch.set_num_threads(1)
CATALOGUE = tiny_sites("llama")


def make_spec(kind="llama", targets="all-linear", **changes):
    sites = resolve_target_sites(tiny_sites(kind), targets)
    fields = {"rank": 3, "alpha": 5.0, "use_rslora": False, "seed": 1, "sites": sites, "dtype": "float64"}
    return lora_spec(**{**fields, **changes})


def random_weights(spec):
    draw = np.random.default_rng(3)
    weights = {}
    for site in spec.sites:
        rank = spec.parts[0].kind.rank
        a, b = (rank, site.in_features), (site.out_features, rank)
        weights[TensorKey(site.index, TensorKind.LORA_A)] = draw.normal(size=a).astype(spec.dtype)
        weights[TensorKey(site.index, TensorKind.LORA_B)] = draw.normal(size=b).astype(spec.dtype)
    return weights


def write_folder(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def add_adapter_by_hand(model, spec, weights):
    """h = f(x) + s B A x at each site, through forward hooks: no peft."""
    for site in spec.sites:
        a = torch.from_numpy(weights[TensorKey(site.index, TensorKind.LORA_A)])
        b = torch.from_numpy(weights[TensorKey(site.index, TensorKind.LORA_B)])

        def add(module, inputs, output, a=a, b=b):
            return output + spec.parts[0].kind.scaling * (inputs[0] @ a.T @ b.T)

        model.get_submodule(site.name).register_forward_hook(add)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "alpha": 2.5},
        {"targets": "mlp"},
        {"rank": 1, "dtype": "float32"},
    ],
)
def test_peft_loads_the_folder_unchanged_and_computes_the_same_logits(kind, changes, tmp_path):
    spec = make_spec(kind, **changes)
    weights = random_weights(spec)
    path = save_tiny_model(kind, tmp_path / "base", dtype=spec.dtype)
    folder = write_folder(tmp_path / "adapter", peft_folder(spec, weights, str(path)))
    tokens = torch.arange(5, 45).reshape(2, 20)

    by_hand = AutoModelForCausalLM.from_pretrained(path)
    bare = by_hand(tokens).logits
    add_adapter_by_hand(by_hand, spec, weights)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), folder).eval()

    expected = by_hand(tokens).logits
    assert (expected - bare).abs().max() > 0.1
    tolerance = 1e-10 if spec.dtype == "float64" else 2e-4
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=tolerance, atol=tolerance)


def test_an_adapter_on_some_layers_lands_on_just_those(tmp_path, recwarn):
    spec = make_spec(targets=("model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"))
    path = save_tiny_model("llama", tmp_path / "base", dtype="float64")
    folder = write_folder(tmp_path / "adapter", peft_folder(spec, random_weights(spec), str(path)))
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), folder)
    adapted = [name for name, module in loaded.get_base_model().named_modules() if hasattr(module, "lora_A")]
    assert adapted == [site.name for site in spec.sites]
    assert not [str(w.message) for w in recwarn if "lora" in str(w.message).lower()]


def test_gpt2_folder_is_marked_for_conv1d_so_that_peft_has_nothing_to_warn_about(tmp_path, recwarn):
    spec = make_spec("gpt2")
    path = save_tiny_model("gpt2", tmp_path / "base")
    folder = write_folder(tmp_path / "adapter", peft_folder(spec, random_weights(spec), str(path)))
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), folder)
    assert not [str(w.message) for w in recwarn if "fan_in_fan_out" in str(w.message)]


@pytest.mark.parametrize("alpha", [16.0, 2.5])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reading_gives_back_what_was_written(alpha, dtype):
    spec = make_spec(targets="attention", alpha=alpha, use_rslora=True, dtype=dtype)
    weights = random_weights(spec)
    found = read_peft_folder(peft_folder(spec, weights, "base"), CATALOGUE)
    assert (found.spec.parts, found.spec.dtype, found.base_model) == (spec.parts, dtype, "base")
    read = found.weights
    assert read.keys() == weights.keys()
    for key, weight in weights.items():
        assert read[key].dtype == weight.dtype
        np.testing.assert_array_equal(read[key], weight)


def test_a_whole_alpha_is_written_as_an_integer():
    files = peft_folder(make_spec(alpha=16.0), random_weights(make_spec()), "base")
    assert '"lora_alpha": 16,' in files[CONFIG_FILE].decode()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_of_others_are_widened_exactly(dtype):
    from safetensors.torch import save

    spec = make_spec(dtype="float32")
    tensors = safetensors.numpy.load(peft_folder(spec, random_weights(spec), "base")[WEIGHTS_FILE])
    halves = {name: torch.from_numpy(values).to(dtype) for name, values in tensors.items()}
    files = {**peft_folder(spec, random_weights(spec), "base"), WEIGHTS_FILE: save(halves)}
    site = spec.sites[0]
    read = read_peft_folder(files, CATALOGUE).weights[TensorKey(site.index, TensorKind.LORA_B)]
    expected = halves[f"base_model.model.{site.name}.lora_B.weight"].float().numpy()
    np.testing.assert_array_equal(read, expected)
    assert read.dtype == np.float32


def changed_config(**changes):
    spec = make_spec()
    files = peft_folder(spec, random_weights(spec), "base")
    config = {**json.loads(files[CONFIG_FILE]), **changes}
    return {**files, CONFIG_FILE: json.dumps(config).encode()}


def changed_tensors(change):
    spec = make_spec()
    files = peft_folder(spec, random_weights(spec), "base")
    tensors = safetensors.numpy.load(files[WEIGHTS_FILE])
    change(tensors)
    return {**files, WEIGHTS_FILE: safetensors.numpy.save(tensors)}


FIRST_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "adapter_config.json is missing"),
        ({CONFIG_FILE: b"{"}, "is not JSON"),
        ({CONFIG_FILE: b"\xff\xfe\x00"}, "is not JSON"),
        ({CONFIG_FILE: b"[1]"}, "is not an object"),
        (changed_config(peft_type="IA3"), "does not say peft_type LORA"),
        (changed_config(use_dora=True), "uses use_dora"),
        (
            changed_config(rank_pattern={"q_proj": 4}),
            "q_proj.lora_A.weight' expects shape (4, 64), got (3, 64)",
        ),
        (changed_config(rank_pattern=[4]), "rank_pattern must be an object, got [4]"),
        (changed_config(rank_pattern={"q_proj": 4.5}), "rank_pattern 'q_proj' must be a whole number"),
        (changed_config(rank_pattern={"(a+)+$": 4}), "holds '(a+)+$', which is not a module's name"),
        (
            changed_config(alpha_pattern={"q_proj": 0}),
            "alpha_pattern 'q_proj' must be a number above 0, got 0",
        ),
        (
            changed_config(alpha_pattern={"k_proj": 1e6}),
            "has alpha 1000000.0 at model.layers.0.self_attn.k_proj",
        ),
        (changed_config(r=512), "has rank 512 at model.layers.0.self_attn.q_proj"),
        (changed_config(bias="all"), "uses bias"),
        (changed_config(r=0), "r must be a whole number above 0, got 0"),
        (changed_config(r=2.5), "r must be a whole number above 0, got 2.5"),
        (changed_config(r=True), "r must be a whole number above 0, got True"),
        (changed_config(lora_alpha=float("nan")), "lora_alpha must be a number above 0, got nan"),
        (changed_config(lora_alpha="16"), "lora_alpha must be a number above 0, got '16'"),
        (changed_config(r=4), "q_proj.lora_A.weight' expects shape (4, 64), got (3, 64)"),
        ({**changed_config(), WEIGHTS_FILE: b"no"}, "is not safetensors"),
        ({**changed_config(), WEIGHTS_FILE: struct.pack("<Q", 2**62) + b"{}"}, "is not safetensors"),
        (changed_tensors(lambda t: t.clear()), "holds no tensors"),
        (changed_tensors(lambda t: t.pop(FIRST_A)), "q_proj' has LORA_B only"),
        (changed_tensors(lambda t: t.update(extra=np.ones(2))), "tensor 'extra' belongs to no site"),
        (changed_tensors(lambda t: t[FIRST_A].__setitem__((1, 2), np.inf)), "not finite"),
        (changed_tensors(lambda t: t.update({FIRST_A: np.ones((3, 64), np.int32)})), "expects a float type"),
        (changed_tensors(lambda t: t.update({FIRST_A: np.ones((64, 3))})), "expects shape (3, 64)"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused_with_the_place(files, message):
    with pytest.raises(InvalidInput) as caught:
        read_peft_folder(files, CATALOGUE)
    assert caught.value.reason == "ADAPTER_FILE_INVALID"
    assert message in str(caught.value)
