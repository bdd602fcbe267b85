"""Load, quantize, add adapters. torch, transformers and peft are imported inside: importing them costs seconds."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from presets import jsonio
from presets.errors import SLIP, ModelError, did_you_mean
from presets.home import expanded
from trainer.job import Job

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")  # files of weights that torch would unpickle


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model ready to train: adapters added, everything on its device."""

    model: Any
    num_parameters: int
    num_trainable_parameters: int
    weights: str  # "loaded" or "random"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What a `--model` value is, found without loading it."""

    name: str
    is_local: bool
    has_weights: bool
    has_tokenizer: bool


UNTRUSTED = (
    "{model} comes with code of its own, which would run here with your rights. "
    "Read it, and pass --trust-remote-code if you trust it."
)


def _no_model(folder: Path) -> str:
    """What lies in a folder without config.json, and what to give in its place."""
    run = folder if (folder / "job.json").is_file() else folder.parent
    if (run / "job.json").is_file():
        merge = f"Make one, and give that: plan merge {shlex.quote(str(run))}"
        if folder == run:
            return f"a run folder, not a model. {merge}"
        if (folder / "adapter_config.json").is_file():
            return f"the adapter of a run, not a model. {merge}"
    if (folder / "adapter_config.json").is_file():
        return "an adapter, not a model. Merge it into its base model, and give that."
    return "no config.json in it. Give the folder that holds config.json."


def inspect_model(name: str) -> ModelFiles:
    """What lies behind a model's name. No torch; a hub name is believed to have everything.

    Raises:
        ModelError: a folder without config.json, or one whose weights are pickled.
    """
    folder = expanded(name)
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ModelError(f"model '{name}': no such folder. Give a folder with a config.json, or a hub name.")
        if "/" not in name and (meant := _folder_like(name)):  # asking the hub for a slip of the pen takes a minute
            raise ModelError(f"model '{name}': no such folder here.{meant} For one of the hub write OWNER/{name}.")
        return ModelFiles(name, is_local=False, has_weights=True, has_tokenizer=True)
    if not (folder / "config.json").is_file():
        raise ModelError(f"model '{name}': {_no_model(folder)}")
    try:
        config = jsonio.loads((folder / "config.json").read_text(encoding="utf-8"), strict=False)
    except (OSError, ValueError) as reason:
        raise ModelError(f"model '{name}': config.json cannot be read ({reason}). Save the model again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"model '{name}': config.json is no object with settings. Save the model again.")
    has_weights = any(folder.glob("*.safetensors"))
    pickled = sorted(path.name for ending in PICKLED for path in folder.glob(ending))
    if not has_weights and pickled:
        raise ModelError(
            f"model '{name}': its weights are pickled ({pickled[0]}), which can run code when loaded. Convert them to "
            "safetensors, on a machine where that does no harm: with transformers, "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)."
        )
    has_tokenizer = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    return ModelFiles(str(folder), is_local=True, has_weights=has_weights, has_tokenizer=has_tokenizer)


def _folder_like(name: str) -> str:
    try:
        return did_you_mean(name, [path.name for path in Path().iterdir() if (path / "config.json").is_file()], SLIP)
    except OSError:
        return ""


def load_model(job: Job, *, need_weights: bool) -> LoadedModel:
    """The job's model on its device, with adapters, in training mode.

    Args:
        need_weights: refuse a folder that holds only config.json; otherwise random weights are made, which cost the
            same time and memory.

    Raises:
        ModelError: the model cannot be loaded, or has no weights where they are needed.
    """
    import torch

    from trainer.fused import fuse_adapters
    from trainer.gated import fuse_mlps
    from trainer.kernels import settle_kernels
    from trainer.norms import fuse_norms
    from trainer.rotary import fuse_rotary
    from trainer.siblings import join_siblings

    quiet_libraries()
    if job.device == "cuda":
        settle_kernels()
    files = inspect_model(job.model)
    if need_weights and not files.has_weights:
        raise ModelError(
            f"model '{job.model}': it has a config.json but no weights (*.safetensors). "
            "Planning needs none; a run does."
        )
    torch.manual_seed(job.seed)
    try:
        base = _load_base(job, files)
    except (torch.cuda.OutOfMemoryError, MemoryError):
        raise
    except ModelError:
        raise
    except Exception as reason:
        if is_out_of_memory(reason):
            raise
        raise _cannot_be_loaded(job.model, reason) from reason
    base.config.use_cache = False
    _keep_trainable_kernels(base)
    if job.preset.gradient_checkpointing:
        _enable_checkpointing(base)
    num_parameters = _count_parameters(base)
    if job.preset.adapter == "lora":
        model = _add_lora(base, job)
        fuse_adapters(model)
    else:
        model = base.float()
        model.requires_grad_(True)
    for parameter in model.parameters():
        # fp16 gradients cannot be unscaled and bf16 steps round away small updates: what trains is always fp32.
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if job.base_precision not in ("4bit", "8bit"):
        model.to(job.device)
    if not job.compile:  # compiling fuses the models' own lines
        fuse_norms(model)
        fuse_rotary(model)
        fuse_mlps(model)
        join_siblings(model)
    model.train()
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return LoadedModel(model, num_parameters, trainable, "loaded" if files.has_weights else "random")


def load_base(job: Job) -> Any:
    """The base model alone, with its weights, as `load_model` loads it before it adds anything.

    Raises:
        ModelError: as `load_model`.
    """
    files = inspect_model(job.model)
    if not files.has_weights:
        raise ModelError(f"model '{job.model}': no weights (*.safetensors) to load.")
    try:
        return _load_base(job, files)
    except ModelError:
        raise
    except Exception as reason:
        if is_out_of_memory(reason):
            raise
        raise _cannot_be_loaded(job.model, reason) from reason


def _cannot_be_loaded(model: str, reason: BaseException) -> ModelError:
    if "trust_remote_code" in str(reason):
        return ModelError(UNTRUSTED.format(model=f"model '{model}'"))
    return ModelError(f"model '{model}': it cannot be loaded ({_one_line(reason)}).")


def quiet_libraries() -> None:
    """Keep progress bars and advice of the libraries off a user's terminal; errors still come as exceptions."""
    import logging
    import warnings

    import transformers

    # Renamed methods that peft still calls by their old names: nothing a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _load_base(job: Job, files: ModelFiles) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    quantized = job.base_precision in ("4bit", "8bit")
    compute = dtypes.get("fp32" if job.precision == "tf32" else job.precision, torch.float32)
    dtype = compute if quantized else dtypes[job.base_precision]
    arguments: dict[str, Any] = {"dtype": dtype, "attn_implementation": job.preset.attention}
    if not files.has_weights and not quantized:
        config = AutoConfig.from_pretrained(files.name, trust_remote_code=job.trust_remote_code)
        with torch.device(job.device):  # made where it is used: filling 8 B weights on a CPU takes minutes
            return AutoModelForCausalLM.from_config(config, trust_remote_code=job.trust_remote_code, **arguments)
    if quantized:
        arguments["quantization_config"] = _quantization(job, compute)
        arguments["device_map"] = {"": job.device}
        if not files.has_weights:
            return _random_quantized(job, files, arguments)
    return AutoModelForCausalLM.from_pretrained(
        files.name, trust_remote_code=job.trust_remote_code, use_safetensors=True, **arguments
    )


def _keep_trainable_kernels(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference when a model is evaluated on a CPU with AVX512-BF16.

    Its kernel for repacked weights has no backward pass: after the first evaluation, training would go on with
    gradients that stop at the quantized layers, and nothing but a warning would say so.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _enable_checkpointing(model: Any) -> None:
    """Activations are made again in the backward pass. Non-reentrant: with a frozen base no input needs a gradient, and
    the reentrant kind would then silently train nothing (transformers#42489)."""
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.2x on
    if enable is not None:
        enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _quantization(job: Job, compute: Any) -> Any:
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"base_precision is '{job.base_precision}', which needs bitsandbytes. "
            "Install it (pip install bitsandbytes) or choose base_precision fp16."
        )
    from transformers import BitsAndBytesConfig

    if job.base_precision == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def _random_quantized(job: Job, files: ModelFiles, arguments: dict[str, Any]) -> Any:
    """Random weights, quantized: written to a temporary folder first, since quantizing happens while loading."""
    import tempfile

    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(files.name, trust_remote_code=job.trust_remote_code)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=arguments["dtype"]).save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **arguments)


def _add_lora(base: Any, job: Job) -> Any:
    from peft import LoraConfig, get_peft_model

    preset = job.preset
    targets: Any = preset.lora_targets
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
    config = LoraConfig(
        r=preset.lora_rank,
        lora_alpha=preset.lora_alpha,  # type: ignore[arg-type]  # a float works; peft's annotation says int
        lora_dropout=preset.lora_dropout,
        target_modules=targets,
        use_rslora=preset.lora_rslora,
        task_type="CAUSAL_LM",
    )
    base.requires_grad_(False)
    try:
        return get_peft_model(base, config)
    except ValueError as reason:
        raise ModelError(
            f"lora_targets '{preset.lora_targets}' fits no layer of this model ({_one_line(reason)})."
        ) from None


def _count_parameters(model: Any) -> int:
    """Parameters of the model as published: a 4-bit weight holds two in a byte."""
    total = 0
    for parameter in model.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        count = parameter.numel()
        if shape is not None:
            count = 1
            for side in shape:
                count *= int(side)
        total += count
    return total


def is_out_of_memory(reason: BaseException) -> bool:
    """Whether an exception means that memory ran out, on any device."""
    import torch

    if isinstance(reason, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    text = str(reason).lower()
    return isinstance(reason, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "cannot allocate memory" in text
    )


def _one_line(reason: BaseException) -> str:
    lines = str(reason).strip().splitlines()
    return (lines[0] if lines else type(reason).__name__)[:300]
