"""The runs that golden.json holds: what each says beside RECIPE, and how each is started. No line here runs anything.

All of them have the repository's tests/conftest.py models, rows that tests/test_golden.py makes, and a folder of their
own as the working directory; so no path in a recipe depends on the machine.
"""

RECIPE = {
    "model_name_or_path": "./student", "teacher_model_name_or_path": "./teacher", "dataset_name": "./train.jsonl",
    "eval_dataset_name": "./held_out.jsonl", "output_dir": "./run", "max_steps": 8, "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 2, "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant",
    "max_grad_norm": 1e9, "bf16": False, "activation_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "use_cpu": True, "taid_alpha": 0.8, "taid_beta": 0.5,
}  # fmt: skip

FORWARD_KL = {"objective": "forward_kl"}
HIDDEN = {"teacher_cache": "./cache", "teacher_cache_format": "hidden"}
TOP_K = {"teacher_cache": "./cache", "teacher_cache_format": "top_k", "teacher_top_k": 16}
SERVED = {"teacher_server_url": "URL", "teacher_top_k": 16}  # that of tests/prompt_server.py
LORA = {
    "use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lora_target_modules": ["q_proj", "up_proj"],
    "optim": "adamw_torch", "learning_rate": 0.01, "lr_scheduler_type": "cosine", "max_grad_norm": 1.0,
}  # fmt: skip
SAVED = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}

# Where a recipe names a cache, `taid cache` makes it first.
RUNS = {
    "taid": {},
    "taid, hidden cache": HIDDEN,
    "taid, top-k cache": TOP_K,
    "taid, server": SERVED,
    "taid, packed": {"packing": True, "max_length": 24, "per_device_train_batch_size": 2},
    "taid, padding-free": {"padding_free": True, "max_length": None},
    "taid, two micro-batches": {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "kd_ratio": 0.7, "learning_rate": 0.03,
    },
    "taid, LoRA": LORA,
    "taid, vision": {
        "model_name_or_path": "./eyes_student", "teacher_model_name_or_path": "./eyes_teacher",
        "dataset_name": "./images.jsonl", "eval_dataset_name": "./images.jsonl", "max_length": 512,
    },
    "taid, resumed": SAVED,
    "taid, two processes": {"per_device_train_batch_size": 2},
    "taid_schedule: auto": {"taid_schedule": "auto"},
    "forward_kl": FORWARD_KL,
    "forward_kl, hidden cache": FORWARD_KL | HIDDEN,
    "forward_kl, top-k cache": FORWARD_KL | TOP_K,
    "forward_kl, server": FORWARD_KL | SERVED,
    "forward_kl, resumed": FORWARD_KL | SAVED | {"optim": "adamw_torch", "learning_rate": 0.001},
    "sampling: mixed": FORWARD_KL | {"sampling": "mixed", "sampling_max_new_tokens": 12},
}  # fmt: skip

# Options of the launcher, which starts processes of its own.
PROCESSES = {"taid, two processes": ["--accelerate_config", "ddp", "--num_processes", "2", "--main_process_port", "0"]}

# A run that ends itself by SIGKILL when it begins to write this checkpoint, and is then resumed from the one before.
KILLED = {"taid, resumed": "checkpoint-6", "forward_kl, resumed": "checkpoint-6"}

# `taid compare`: what it is given beside a recipe of its own.
COMPARISON = {
    "per_device_train_batch_size": 2, "max_steps": 6, "max_length": 32, "eval_strategy": "steps", "eval_steps": 3,
    "taid_alpha": "auto", "dataset_name": "./compared.jsonl", "eval_dataset_name": "./validation.jsonl",
}  # fmt: skip
COMPARED = [
    "--test", "./test.jsonl", "--objectives", "forward_kl,taid", "--seeds", "2", "--learning_rates", "0.03,0.3",
    "--processes", "2",
]  # fmt: skip

# `taid plan`: recipes of the repository, and how many GPUs each is for.
PLANS = {"taid-llm-1.5b": 4, "llama-3.1-8b-to-3.2-1b-lora": 1, "taid-vlm-2b": 8}
