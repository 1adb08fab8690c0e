import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from cola_runtime.testing.tiny_models import save_tiny_model, tiny_sites

torch.set_num_threads(1)
TOKENS = torch.arange(5, 37).reshape(2, 16)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_of_one_seed_agree_across_dtypes_and_differ_across_seeds(kind, tmp_path):
    def logits(name, **changes):
        model = AutoModelForCausalLM.from_pretrained(save_tiny_model(kind, tmp_path / name, **changes))
        return model(TOKENS).logits.double()

    narrow = logits("a")
    torch.testing.assert_close(logits("b", dtype="float64"), narrow, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits("c"), narrow)
    assert (logits("d", seed=1) - narrow).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_stated_sites_are_the_models_own(kind, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(kind, tmp_path))
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            found.append((name, "conv1d", *module.weight.shape))
        elif isinstance(module, torch.nn.Linear) and name != "lm_head":
            found.append((name, "linear", module.in_features, module.out_features))
    stated = [(site.name, site.kind, site.in_features, site.out_features) for site in tiny_sites(kind)]
    assert stated == found
    assert [site.index for site in tiny_sites(kind)] == list(range(len(found)))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sites_of_one_input_group_receive_the_very_same_input(kind, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(kind, tmp_path))
    inputs = {}
    for site in tiny_sites(kind):
        model.get_submodule(site.name).register_forward_hook(
            lambda module, args, output, site=site: inputs.__setitem__(site, args[0])
        )
    model(TOKENS)
    groups = {}
    for site, x in inputs.items():
        groups.setdefault(x.untyped_storage().data_ptr(), set()).add(site.input_group)
    assert all(len(numbers) == 1 for numbers in groups.values())
    assert len(groups) == len({site.input_group for site in inputs})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_reach_the_lowest_layer_and_are_not_tiny(kind, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(kind, tmp_path))
    model(TOKENS, labels=TOKENS).loss.backward()
    for site in tiny_sites(kind):
        assert model.get_submodule(site.name).weight.grad.norm() > 0.1


def test_the_tokenizer_gives_back_any_text_and_knows_its_special_tokens(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model("llama", tmp_path))
    text = "Grüße, 世界!\n\t \x00 two  spaces <|im_start|>user"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) <= 300
    special = [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, "<|im_start|>", "<|im_end|>"]
    assert [tokenizer(token).input_ids for token in special] == [[0], [1], [2], [3], [4]]


def test_the_chat_template_marks_turns(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model("gpt2", tmp_path))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
