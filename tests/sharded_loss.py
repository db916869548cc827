"""Two processes that shard student and teacher with FSDP2, against one that does not; run by test_heads.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from taid.losses.fused import fused_distillation_loss
from taid.models.output_head import OutputHead


def model(width: int, seed: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300, hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def loss_and_gradients(ids, labels, *, tied: bool, sharded: bool):
    student, teacher = model(32, 0, tied), model(48, 1, False)
    heads = OutputHead(student, "student"), OutputHead(teacher, "teacher")
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for each in (student, teacher):
            for layer in each.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(each, mesh=mesh, reshard_after_forward=True)  # the teacher's head is a DTensor when it is used
    hidden, kinds = [], []
    with torch.no_grad(), heads[1].replaced_by(hidden.append):
        teacher(input_ids=ids)

    def loss_of(student_hidden):
        kinds.extend(type(head.weights()[0]).__name__ for head in heads)
        return fused_distillation_loss(student_hidden, heads[0].head(), hidden[0], heads[1].head(), labels, t=0.4)

    with heads[0].replaced_by(loss_of):
        loss = student(input_ids=ids).loss
    (loss * (dist.get_world_size() if sharded else 1)).backward()  # FSDP takes the mean over processes
    gradients = {n: p.grad.full_tensor() if sharded else p.grad for n, p in student.named_parameters()}
    return loss.detach(), gradients, kinds


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(5)
    ids, labels = torch.randint(300, (4, 9)), torch.randint(300, (4, 9))
    labels[0, :5] = -100
    mine = slice(2 * rank, 2 * rank + 2)
    for tied in (False, True):
        expected, gradients, _ = loss_and_gradients(ids, labels, tied=tied, sharded=False)
        loss, sharded, kinds = loss_and_gradients(ids[mine], labels[mine], tied=tied, sharded=True)
        dist.all_reduce(loss)
        assert abs(loss - expected) < 1e-6 * expected
        for name, gradient in gradients.items():
            assert (gradient - sharded[name]).norm() < 1e-6 * gradient.norm(), name
        assert kinds == ["Parameter", "DTensor"], kinds
    print("equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
