"""The output heads of real architectures: what goes in, what comes after, and what adapters do to them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    RecurrentGemmaConfig,
)

from taid import objectives
from taid.losses.fused import fused_distillation_loss
from taid.models.output_head import OutputHead

COMMON = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
ARCHITECTURES = {
    "llama": (LlamaConfig(**COMMON), 1.0, None),
    "tied llama": (LlamaConfig(**COMMON, tie_word_embeddings=True), 1.0, None),
    "qwen2": (Qwen2Config(**COMMON), 1.0, None),
    "qwen3": (Qwen3Config(**COMMON, head_dim=8), 1.0, None),
    "phi, with a bias": (PhiConfig(**COMMON), 1.0, None),
    "gpt2": (GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, **ENDS), 1.0, None),
    "opt": (OPTConfig(vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                      word_embed_proj_dim=32, **ENDS), 1.0, None),
    "mixtral": (MixtralConfig(**COMMON), 1.0, None),
    "gpt-oss": (GptOssConfig(**COMMON, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
                             rope_parameters={"rope_type": "default", "rope_theta": 1e4}), 1.0, None),
    "gemma2, soft cap": (Gemma2Config(**COMMON, head_dim=8), 1.0, 30.0),
    "recurrent gemma, soft cap of another name": (
        RecurrentGemmaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                             num_attention_heads=4, lru_width=32, attention_window_size=16, **ENDS), 1.0, 30.0),
    "cohere, scale": (CohereConfig(**COMMON, logit_scale=0.0625), 0.0625, None),
    "cohere2, scale": (Cohere2Config(**COMMON, logit_scale=0.25), 0.25, None),
    "granite, divides": (GraniteConfig(**COMMON, logits_scaling=8.0), 0.125, None),
    "falcon-h1, multiplies": (FalconH1Config(**COMMON, lm_head_multiplier=0.3), 0.3, None),
}  # fmt: skip


def model_of(config, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_hidden_states_and_head_give_the_model_s_own_logits(architecture):
    config, scale, softcap = ARCHITECTURES[architecture]
    model = model_of(config)
    head = OutputHead(model, "student")
    assert (head.scale, head.softcap) == (scale, softcap)
    ids = torch.randint(300, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        hidden = []
        with head.replaced_by(hidden.append):
            assert model(input_ids=ids).loss is None
        assert torch.equal(head.head().logits(hidden[0]), expected)
        assert torch.equal(model(input_ids=ids).logits, expected), "outside of the context nothing changes"


@pytest.mark.parametrize("architecture", ["llama", "gemma2, soft cap", "cohere, scale", "mixtral", "phi, with a bias"])
def test_the_loss_is_the_model_s_output_and_its_gradient_that_of_the_plain_formula(architecture):
    student, teacher = model_of(ARCHITECTURES[architecture][0]), model_of(ARCHITECTURES["qwen2"][0], seed=1)
    ids, labels = torch.randint(300, (2, 9)), torch.randint(300, (2, 9))
    labels[0, :4] = -100
    kept = labels != -100
    plain = objectives.taid(student(input_ids=ids).logits[kept], teacher(input_ids=ids).logits[kept], t=0.3).sum()
    plain.backward()
    expected = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()

    heads, hidden = [OutputHead(student, "student"), OutputHead(teacher, "teacher")], []
    with torch.no_grad(), heads[1].replaced_by(hidden.append):
        teacher(input_ids=ids)

    def loss_of(student_hidden):
        return fused_distillation_loss(student_hidden, heads[0].head(), hidden[0], heads[1].head(), labels, t=0.3)

    with heads[0].replaced_by(loss_of):
        loss = student(input_ids=ids).loss
    loss.backward()
    assert abs(loss.item() - plain.item()) < 2e-6 * plain.item()
    for name, parameter in student.named_parameters():
        if name in expected:
            error = (parameter.grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-12)
            assert error < 1e-5, name


def test_the_head_is_given_back_after_an_error():
    model = model_of(ARCHITECTURES["llama"][0])
    head = OutputHead(model, "student")
    ids = torch.randint(300, (1, 3))
    expected = model(input_ids=ids).logits

    def broken(hidden):
        raise KeyError("broken")

    with pytest.raises(KeyError), head.replaced_by(broken):
        model(input_ids=ids)
    assert torch.equal(model(input_ids=ids).logits, expected)


# --- adapters ---------------------------------------------------------------------------------------------------------


def with_lora(**options):
    torch.manual_seed(3)
    model = get_peft_model(model_of(ARCHITECTURES["llama"][0]), LoraConfig(r=4, lora_alpha=8, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide it
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
    ],
    ids=["on the head", "head saved whole", "beside the head"],
)
def test_an_adapter_counts_and_is_trained(options):
    model = with_lora(**options)
    if "modules_to_save" in options:
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    head = OutputHead(model, "student")
    ids, labels = torch.randint(300, (2, 5)), torch.randint(300, (2, 5))
    torch.nn.functional.cross_entropy(
        model(input_ids=ids).logits.flatten(0, 1), labels.flatten(), reduction="sum"
    ).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with head.replaced_by(lambda h: fused_distillation_loss(h, head.head(), None, None, labels, "sft")):
        model(input_ids=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert expected[name].norm() > 0
            assert (parameter.grad - expected[name]).norm() < 1e-5 * expected[name].norm(), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["lm_head"], "lora_dropout": 0.1}, "lora_dropout: 0"),
        ({"target_modules": ["lm_head"], "use_dora": True}, "no plain LoRA"),
    ],
)
def test_an_adapter_that_is_no_matrix_is_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        OutputHead(with_lora(**options), "student")
    assert "fused: false" in str(error.value)


# --- what is not understood is refused --------------------------------------------------------------------------------


class Shifts(nn.Module):
    """Adds a number to the logits of a Llama."""

    def __new__(cls):
        model = model_of(ARCHITECTURES["llama"][0])
        own = model.forward

        def forward(**inputs):
            outputs = own(**inputs)
            outputs.logits = outputs.logits + 0.5
            return outputs

        model.forward = forward
        return model


def test_a_model_that_does_something_unknown_to_its_logits_is_refused():
    with pytest.raises(ValueError, match=r"neither a factor nor a soft cap.*fused: false"):
        OutputHead(Shifts(), "teacher")


def test_a_head_that_is_no_linear_layer_is_refused():
    model = model_of(ARCHITECTURES["llama"][0])
    model.set_output_embeddings(nn.Sequential(nn.Linear(32, 300)))
    with pytest.raises(ValueError, match=r"student's output head is a Sequential.*fused: false"):
        OutputHead(model, "student")


def test_a_model_that_does_not_call_its_head_is_refused():
    model = model_of(ARCHITECTURES["llama"][0])
    spare = nn.Linear(32, 300)
    model.get_output_embeddings = lambda: spare
    with pytest.raises(ValueError, match="does not compute its logits by its output head"):
        OutputHead(model, "student")


def test_the_probe_leaves_the_random_state_and_the_mode_alone():
    model = model_of(ARCHITECTURES["llama"][0]).train()
    before = torch.random.get_rng_state()
    OutputHead(model, "student")
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)


def test_half_precision_is_understood():
    for name in ("gemma2, soft cap", "granite, divides", "falcon-h1, multiplies"):
        config, scale, softcap = ARCHITECTURES[name]
        head = OutputHead(model_of(config, dtype=torch.bfloat16), "student")
        assert (head.scale, head.softcap) == (scale, softcap)


def test_ids_cut_the_head():
    model = model_of(ARCHITECTURES["phi, with a bias"][0])
    head, ids = OutputHead(model, "student"), torch.tensor([3, 5, 299])
    cut, whole = head.head(ids), head.head()
    assert torch.equal(cut.weight, whole.weight[ids])
    assert torch.equal(cut.bias, whole.bias[ids])
    labels = torch.tensor([0, 2, -100, 1])
    hidden = torch.randn(4, 32)
    expected = torch.nn.functional.cross_entropy(cut.logits(hidden), labels, reduction="sum")
    assert abs(fused_distillation_loss(hidden, cut, None, None, labels, "sft").loss - expected) < 1e-5


@pytest.mark.cli
@pytest.mark.slow
def test_sharded_student_and_teacher_give_what_whole_ones_give():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, Path(__file__).with_name("sharded_loss.py")], capture_output=True, text=True)
    assert done.stdout.count("equal") == 2, done.stderr
