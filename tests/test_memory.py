"""A traced micro-batch holds what a real one holds, counted; and engines share it out as they say."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen3MoeConfig,
)

from taid.losses.fused import Head, fused_distillation_loss
from taid.models.output_head import OutputHead
from taid.planning.activation_trace import Batch, Loss, _Held, trace_student
from taid.planning.footprint import Footprint, Layout, size

WIDE = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 16}
VOCABULARY = 512
CONFIGS = {
    "llama": LlamaConfig(**WIDE, num_hidden_layers=6),
    "tied": LlamaConfig(**WIDE, num_hidden_layers=6, tie_word_embeddings=True),
    # With dropout in it, attention on a CPU is no kernel.
    "gpt2": GPT2Config(n_embd=96, n_head=6, n_layer=6, n_positions=128, attn_pdrop=0.0),
    "granite": GraniteConfig(**{n: v for n, v in WIDE.items() if n != "head_dim"}, num_hidden_layers=6),
}


def built(config, *, peft_config=None, dtype=torch.float32, device="meta"):
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        return model if peft_config is None else get_peft_model(model, copy.deepcopy(peft_config))


def sized(name):
    config = CONFIGS[name]
    config.vocab_size = VOCABULARY
    return config


def really(model, batch, teacher_width, *, checkpoints=False):
    """Moments of a real forward and backward pass on the CPU, by the same count."""
    head = OutputHead(model, "student")
    if checkpoints:
        model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    model.train()
    teacher_head = torch.nn.Linear(teacher_width, VOCABULARY, bias=False)
    held = _Held(torch.nn.ModuleList([model, teacher_head]))
    hooks = [w.register_post_accumulate_grad_hook(held.take) for w in model.parameters() if w.requires_grad]
    ids = torch.randint(VOCABULARY, (batch.rows, batch.length))
    labels = ids.roll(-1, 1)
    with held:
        of_teacher = [torch.randn(batch.rows, batch.length, teacher_width)]

        def loss_of(hidden):
            return fused_distillation_loss(
                hidden, head.head(None), of_teacher.pop(), Head(teacher_head.weight), labels, "taid", t=0.3
            )

        with head.replaced_by(loss_of):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).loss
        torch.autograd.backward(loss)
    for hook in hooks:
        hook.remove()
    return held.moments


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_trace_holds_what_a_real_step_holds(name, adapter, checkpoints):
    config, batch = sized(name), Batch(3, 64, is_masked=False, autocast=None, device="cpu")
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if adapter else None
    trace = trace_student(
        lambda config: built(config, peft_config=lora), config, batch,
        Loss(VOCABULARY, (160, torch.float32), is_fused=True), checkpoints=checkpoints, offloads=False,
    )  # fmt: skip
    assert sorted(trace.of) == [2, 4], "six layers are extrapolated"
    model = built(config, peft_config=lora, device="cpu")
    if adapter and checkpoints:
        model.enable_input_require_grads()
    moments = really(model, batch, 160, checkpoints=checkpoints)
    for share in (0.0, 0.5, 1.0):
        real = max(m.held + share * m.done for m in moments)
        assert max(trace.peaks(share=share)) == pytest.approx(real, rel=0.03), share
    assert (
        trace.gradients
        == moments[-1].done + sum(w.nbytes for w in model.parameters() if w.requires_grad) - moments[-1].done
    )


def test_few_layers_tell_what_all_hold():
    batch, loss = Batch(2, 64, True, torch.bfloat16, "cuda"), Loss(VOCABULARY, (160, torch.bfloat16), True)
    for name in CONFIGS:
        config = sized(name)
        few = trace_student(built, config, batch, loss, checkpoints=False, offloads=False)
        config = type(config)(**config.to_dict() | {"mlp_only_layers": [9]})  # which says that layers may differ
        all_ = trace_student(built, config, batch, loss, checkpoints=False, offloads=False)
        assert (len(few.of), len(all_.of)) == (2, 1)
        for share in (0.0, 0.25, 1.0):
            for accumulates in (False, True):
                given = {"share": share, "accumulates": accumulates}
                assert few.peaks(**given) == pytest.approx(all_.peaks(**given), rel=1e-9), (name, given)


def test_what_is_kept_is_what_the_options_say():
    config, loss = sized("llama"), Loss(VOCABULARY, None, True)

    def peak(batch=None, loss=loss, checkpoints=False, offloads=False):
        batch = batch or Batch(2, 64, False, None, "cpu")
        return max(trace_student(built, config, batch, loss, checkpoints=checkpoints, offloads=offloads).peaks(share=0))

    whole = peak()
    assert peak(Batch(4, 64, False, None, "cpu")) == pytest.approx(2 * whole, rel=0.1)  # but for the loss's tile
    assert peak(checkpoints=True) < 0.5 * whole
    assert peak(offloads=True) < 0.5 * whole
    masked = peak(Batch(2, 64, True, None, "cpu"))
    assert masked - whole == pytest.approx(6 * 2 * 64 * 64 * 4, rel=0.3), "a mask a layer, in the products' dtype"
    half = peak(Batch(2, 64, False, torch.bfloat16, "cpu"))
    assert half < whole
    plain = peak(loss=Loss(VOCABULARY, (96, torch.float32), is_fused=False))
    assert plain - whole > 3 * 2 * 64 * VOCABULARY * 4, "logits, and what the formula makes of them"


def test_experts_and_caps_can_be_traced():
    batch, loss = Batch(2, 32, True, torch.bfloat16, "cuda"), Loss(VOCABULARY, (96, torch.bfloat16), True)
    moe = Qwen3MoeConfig(**WIDE | {"vocab_size": VOCABULARY}, num_hidden_layers=2, num_experts=4, num_experts_per_tok=2,
                         moe_intermediate_size=32)  # fmt: skip
    gemma = Gemma2Config(**WIDE | {"vocab_size": VOCABULARY}, num_hidden_layers=4)
    for config in (moe, gemma):
        trace = trace_student(built, config, batch, loss, checkpoints=True, offloads=False)
        assert trace.gradients == 4 * sum(w.numel() for w in built(config).parameters())


# --- engines ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def footprint():
    student = size(LlamaConfig(**WIDE, vocab_size=VOCABULARY, num_hidden_layers=6, tie_word_embeddings=True))
    teacher = size(LlamaConfig(**WIDE, vocab_size=VOCABULARY, num_hidden_layers=12))
    return Footprint(
        student, teacher, torch.float32, torch.bfloat16, Batch(2, 64, False, torch.bfloat16, "cuda"),
        Loss(VOCABULARY, (96, torch.bfloat16), True), "adamw_torch_fused", False, True, False,
    )  # fmt: skip


def test_engines_cut_what_they_say(footprint):
    n, s, t = 4, footprint.student.weights, footprint.teacher

    def of(engine, placement="replicated"):
        return footprint.held(Layout(engine, placement, n))

    alone = footprint.held(Layout("none", "replicated", 1))
    assert {k: alone[k] for k in ("weights", "gradients", "optimizer", "buffers", "teacher")} == {
        "weights": 4 * s, "gradients": 4 * s, "optimizer": 8 * s, "buffers": 0, "teacher": 2 * t.weights,
    }  # fmt: skip
    ddp = of("ddp")
    assert {**ddp, "activations": 0} == {**alone, "activations": 0}
    assert ddp["activations"] >= alone["activations"], "its buckets are there before the gradients are"
    zero2, zero3, fsdp2 = of("zero2"), of("zero3"), of("fsdp2")
    assert (zero2["weights"], zero2["gradients"], zero2["optimizer"]) == (2 * s, 2 * s / n, (8 + 4) * s / n)
    assert (zero3["weights"], zero3["gradients"], zero3["optimizer"]) == (2 * s / n, 2 * s / n, (8 + 4) * s / n)
    assert (fsdp2["weights"], fsdp2["gradients"], fsdp2["optimizer"]) == (4 * s / n, 4 * s / n, 8 * s / n)
    layer, head = footprint.teacher.layer, VOCABULARY * 96
    assert of("ddp", "sharded")["teacher"] == 2 * (t.weights / n + head + 2 * layer)
    assert of("ddp", "cpu")["teacher"] == 2 * (head + 2 * layer)


def test_quantized_weights_take_what_their_blocks_take(footprint):
    t = footprint.teacher
    outside = t.weights - t.products
    assert t.products == 12 * (4 * 96 * 96 + 3 * 96 * 256)
    for name, each in (("bnb_8bit", 1), ("bnb_4bit", 0.5 + 4 / 64)):
        found = replace(footprint, teacher_quantized=name).held(Layout("ddp", "replicated", 2))["teacher"]
        assert found == 2 * outside + each * t.products
