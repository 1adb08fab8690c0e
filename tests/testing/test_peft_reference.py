import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cola_runtime.adapter_spec import lora_spec
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.rows import Row
from cola_runtime.testing.peft_reference import (
    Recipe,
    adapter_parameters,
    batch_loss,
    peft_model,
    relative_difference,
    train_alone,
)
from cola_runtime.testing.tiny_models import save_tiny_model, tiny_sites
from cola_runtime.types import LearningRateSchedule, OptimizerHyperparameters, TensorKey, TensorKind

torch.set_num_threads(1)
A, B = TensorKind.LORA_A, TensorKind.LORA_B


def make_row(length, seed, weight=1.0):
    draw = np.random.default_rng(seed)
    weights = np.full(length, weight, dtype=np.float32)
    weights[: length // 3 + 1] = 0.0
    return Row(tokens=draw.integers(5, 261, length).astype(np.int32), weights=weights)


def make_recipe(kind="llama", *, dtype="float64", steps=3, optimizer=None, schedule=None, **changes):
    fields = {"rank": 2, "alpha": 4.0, "use_rslora": False, "seed": 3, "dtype": dtype}
    spec = lora_spec(sites=tiny_sites(kind), **{**fields, **changes})
    return Recipe(
        spec=spec,
        initial_weights=initial_weights(spec),
        steps=[[make_row(9 + k, k), make_row(14, 50 + k, weight=0.5)] for k in range(steps)],
        optimizer=optimizer or OptimizerHyperparameters(kind="adamw", learning_rate=1e-2, weight_decay=0.1),
        schedule=schedule or LearningRateSchedule(kind="constant", warmup_steps=0, total_steps=steps),
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {kind: save_tiny_model(kind, folder / kind, dtype="float64") for kind in ("llama", "gpt2")}


def plain_loss(model, rows):
    """Row by row, unpadded, token by token."""
    total = weight = 0.0
    for row in rows:
        log_p = model(torch.from_numpy(row.tokens).long()[None]).logits[0].log_softmax(-1)
        for position in range(1, len(row.tokens)):
            total = total - row.weights[position].item() * log_p[position - 1, row.tokens[position]]
            weight += row.weights[position].item()
    return total / weight


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_first_loss_is_the_bare_models_whatever_the_padding(kind, models):
    recipe = make_recipe(kind)
    bare = AutoModelForCausalLM.from_pretrained(models[kind])
    losses = train_alone(models[kind], recipe, dtype="float64").losses
    assert losses[0] == pytest.approx(float(plain_loss(bare, recipe.steps[0])), rel=1e-6)
    assert len(losses) == 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_sgd_step_moves_by_the_gradient_of_our_own_formula(kind, models):
    sgd = OptimizerHyperparameters(kind="sgd", learning_rate=0.5)
    recipe = make_recipe(kind, steps=1, optimizer=sgd, use_rslora=True)
    draw = torch.Generator().manual_seed(1)
    start = {
        key: torch.randn(w.shape, generator=draw).double() / 8 for key, w in recipe.initial_weights.items()
    }
    recipe = dataclasses.replace(recipe, initial_weights=start)

    gradient = captured_gradient(models[kind], recipe)
    expected = {key: start[key] - 0.5 * gradient[key] for key in start}
    trained = train_alone(models[kind], recipe, dtype="float64").weights
    assert max(relative_difference(trained, expected).values()) < 1e-12


def captured_gradient(path, recipe):
    """Hooks take x and g at each site of peft's own model; LoRA's formula does the rest."""
    spec = recipe.spec
    model = peft_model(path, spec, dtype="float64")
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, spec).items():
            parameter.copy_(recipe.initial_weights[key])
    taps = {}
    for site in spec.sites:
        module = model.get_base_model().get_submodule(site.name)

        def keep(module, args, output, index=site.index):
            output.register_hook(lambda grad: taps.__setitem__(index, (args[0].detach(), grad)))

        module.register_forward_hook(keep)
    batch_loss(model, recipe.steps[0]).backward()
    gradient = {}
    for site in spec.sites:
        a, b = TensorKey(site.index, A), TensorKey(site.index, B)
        x, g = (tensor.flatten(0, 1) for tensor in taps[site.index])
        weights = recipe.initial_weights
        s = spec.parts[0].kind.scaling
        gradient[a] = s * (g @ weights[b]).T @ x
        gradient[b] = s * g.T @ (x @ weights[a].T)
    return gradient


def test_two_steps_are_one_step_and_then_another(models):
    sgd = OptimizerHyperparameters(kind="sgd", learning_rate=0.5)
    recipe = make_recipe(steps=2, optimizer=sgd)
    together = train_alone(models["llama"], recipe, dtype="float64").weights
    weights = recipe.initial_weights
    for rows in recipe.steps:
        single = dataclasses.replace(recipe, initial_weights=weights, steps=[rows])
        weights = train_alone(models["llama"], single, dtype="float64").weights
    assert max(relative_difference(together, weights).values()) < 1e-12


def test_training_lowers_the_loss_on_repeated_rows(models):
    recipe = make_recipe(steps=8)
    recipe = dataclasses.replace(recipe, steps=[recipe.steps[0]] * 8)
    losses = train_alone(models["llama"], recipe, dtype="float64").losses
    assert losses[-1] < losses[0] - 0.1


def test_the_schedule_and_the_clip_act_on_the_step(models):
    def moved(**changes):
        sgd = OptimizerHyperparameters(kind="sgd", learning_rate=1.0, **changes.pop("clip", {}))
        recipe = make_recipe(steps=1, optimizer=sgd, **changes)
        weights = train_alone(models["llama"], recipe, dtype="float64").weights
        return torch.cat([(weights[k] - recipe.initial_weights[k]).flatten() for k in weights])

    whole = moved()
    warm = moved(schedule=LearningRateSchedule(kind="linear", warmup_steps=4, total_steps=9))
    torch.testing.assert_close(warm, whole / 4)
    clipped = moved(clip={"max_grad_norm": 0.01})
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), whole / whole.norm())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_float32_and_float64_runs_agree_to_rounding(kind, models):
    wide = train_alone(models[kind], make_recipe(kind), dtype="float64")
    narrow = train_alone(models[kind], make_recipe(kind, dtype="float32"), dtype="float32")
    assert all(weight.dtype == torch.float32 for weight in narrow.weights.values())
    assert max(relative_difference(narrow.weights, wide.weights).values()) < 1e-3


def test_a_float32_adapter_trains_on_a_bfloat16_base(models):
    trained = train_alone(models["llama"], make_recipe(dtype="float32"), dtype="bfloat16")
    assert all(weight.dtype == torch.float32 for weight in trained.weights.values())
    assert all(np.isfinite(trained.losses))


def test_relative_difference_is_per_tensor_and_names_missing_ones():
    first, second = TensorKey(0, A), TensorKey(0, B)
    reference = {first: torch.tensor([3.0, 4.0]), second: torch.zeros(2)}
    values = {first: torch.tensor([3.0, 4.5]), second: torch.tensor([0.0, 1e-9])}
    assert relative_difference(values, reference) == {first: pytest.approx(0.1), second: float("inf")}
    assert relative_difference(reference, reference) == {first: 0.0, second: 0.0}
    with pytest.raises(ValueError, match="LORA_B"):
        relative_difference({first: reference[first]}, reference)
