"""The page that goes with an exported adapter: what it is, what it was made of, how to load it."""

from __future__ import annotations

from .checkpoint import Adapter
from .config import LORA_FAMILY, RunConfig

#: Every method but `head` and `giva`, and where it is defined.
SOURCES = {
    "lora": "LoRA (arXiv:2106.09685)",
    "ffa-lora": "FFA-LoRA (arXiv:2403.12313)",
    "rolora": "RoLoRA (arXiv:2502.01755)",
    "fedex-lora": "FedEx-LoRA (arXiv:2410.09432)",
    "vera": "VeRA (arXiv:2310.11454)",
    "osora": "OSoRA (arXiv:2505.14350)",
    "randlora": "RandLoRA (arXiv:2502.00987)",
    "lora-xs": "LoRA-XS (arXiv:2405.17604, arXiv:2502.15436)",
    "full": "all weights, averaged (arXiv:1602.05629)",
}


def merged_card(adapter: Adapter, base_digest: str) -> str:
    """The page of a merged model, Markdown.

    Args:
        adapter: What was merged.
        base_digest: SHA-256 of the base model below the head, before the merge.
    """
    config = adapter.metadata.config
    about = (
        f"{config.model.path}, fine-tuned federatedly with fedgiva; the adapter is merged into the weights.",
        "The base model's licence holds for this model too. Evaluate it on your own data before you rely on it.",
    )
    return _card(adapter, base_digest, "transformers", "merged", about, _merged_usage(config))


def lora_card(adapter: Adapter) -> str:
    """The page of an adapter in PEFT's format, Markdown."""
    config = adapter.metadata.config
    about = (
        f"A LoRA for {config.model.path}, fine-tuned federatedly with fedgiva. It computes what the trained adapter "
        "does: nothing was approximated in the conversion.",
        "It works on that base model alone. Evaluate it on your own data before you rely on it.",
    )
    return _card(adapter, adapter.metadata.model_digest, "peft", "LoRA", about, _lora_usage(adapter))


def _card(adapter: Adapter, digest: str, library: str, form: str, about: tuple[str, str], usage: str) -> str:
    config, known = adapter.metadata.config, adapter.metadata
    base = config.model.path
    facts = [
        ("Base model", f"{base} (SHA-256 of the model below the head {digest or 'not known'})"),
        ("Task", f"{config.task.kind}, {max(1, len(config.task.labels))} outputs, head `{config.task.head}`"),
        ("Method", _method(config, len(known.schema.layers))),
        ("Texts cut after", f"{config.task.max_length} tokens"),
        ("Trained with", ", ".join(f"{name} {version}" for name, version in known.versions.items())),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    tags = f"tags: [federated-learning, fedgiva]\nlibrary_name: {library}\npipeline_tag: text-classification"
    return (
        f"---\n{tags}\n---\n\n# {config.name or base}, {form}\n\n{about[0]}\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Use\n\n{usage}\n\n## Licence and limits\n\n{about[1]}\n"
    )


def _method(config: RunConfig, layers: int) -> str:
    if config.method == "giva":
        giva = config.giva
        return (
            f"GiVA (arXiv:2604.21901), rank {giva.rank}, init {giva.init}, {layers} layers, mode {config.rounds.mode}"
        )
    if config.method == "head":
        return "the task head alone"
    alpha = f", alpha {config.lora.alpha:g}" if config.method in LORA_FAMILY else ""
    return SOURCES[config.method] + (f", rank {config.rank}{alpha}" if config.rank else "")


def _merged_usage(config: RunConfig) -> str:
    if config.task.head == "native":
        name, note = "AutoModelForSequenceClassification", ""
        imports = f"from transformers import {name}, AutoTokenizer"
    else:
        name = "MeanPoolingClassifier"
        imports = f"from giva_core.models import {name}\nfrom transformers import AutoTokenizer"
        note = (
            "\n\nThe head is linear on the mean-pooled, normalised sentence vector times 10. `AutoModel` loads the "
            "encoder alone; `AutoModelForSequenceClassification` would put another head on it."
        )
    load = f'model = {name}.from_pretrained("this-folder")\ntokenizer = AutoTokenizer.from_pretrained("this-folder")'
    return f"```python\n{imports}\n\n{load}\n```{note}"


def _lora_usage(adapter: Adapter) -> str:
    config = adapter.metadata.config
    name = "AutoModelForSequenceClassification" if config.task.head == "native" else "MeanPoolingClassifier"
    imports = ["from peft import PeftModel", "from transformers import AutoConfig"]
    if config.task.head == "native":
        imports[1] += f", {name}"
    else:
        imports.insert(0, f"from giva_core.models import {name}")
    code = [
        *imports,
        "",
        f'path = "{config.model.path}"  # the base model',
        f"config = AutoConfig.from_pretrained(path, num_labels={max(1, len(config.task.labels))})",
        f"base = {name}.from_pretrained(path, config=config)",
        'model = PeftModel.from_pretrained(base, "this-folder")',
    ]
    return "```python\n" + "\n".join(code) + "\n```"
