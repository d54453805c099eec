"""The page that goes with an exported adapter: what it is, what it was made of, how to load it."""

from __future__ import annotations

from .checkpoint import Adapter
from .config import ANSWER_TASKS, LORA_FAMILY, RunConfig, TaskConfig

#: The Hub's name of the task, and transformers' class for models with its own head, by `task.kind`.
_PIPELINES = {
    "causal-lm": "text-generation",
    "seq2seq": "text2text-generation",
    "image-classification": "image-classification",
}
_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}

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


def is_plain_model(task: TaskConfig) -> bool:
    """Whether the trained model is of a class that transformers has, and not one of this project's."""
    return task.head == "native" or task.kind in _CLASSES


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
        ("Task", _task(config.task)),
        ("Method", _method(config, len(known.schema.layers))),
        ("Texts cut after", f"{config.task.max_length} tokens"),
        ("Trained with", ", ".join(f"{name} {version}" for name, version in known.versions.items())),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in facts)
    pipeline = _PIPELINES.get(config.task.kind, "text-classification")
    tags = f"tags: [federated-learning, fedgiva]\nlibrary_name: {library}\npipeline_tag: {pipeline}"
    return (
        f"---\n{tags}\n---\n\n# {config.name or base}, {form}\n\n{about[0]}\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Use\n\n{usage}\n\n## Licence and limits\n\n{about[1]}\n"
    )


def _task(task: TaskConfig) -> str:
    if task.kind in ANSWER_TASKS:
        return f"{task.kind}, {task.prompt_format} prompts" + (
            f" `{task.prompt_template!r}`" * bool(task.prompt_template)
        )
    return f"{task.kind}, {_outputs(task)} outputs, head `{task.head}`"


def _outputs(task: TaskConfig) -> int:
    return 1 if task.kind == "regression" else len(task.labels)  # labels are not looked at where a number is learned


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


def _labelled(task: TaskConfig) -> list[str]:
    """Code that reads the base model's configuration, with the labels: PEFT's format has no place for them."""
    if task.kind == "regression":
        return ["config = AutoConfig.from_pretrained(path, num_labels=1)"]
    return [
        f"labels = {list(task.labels)!r}",
        'names = {"id2label": dict(enumerate(labels)), "label2id": {name: n for n, name in enumerate(labels)}}',
        "config = AutoConfig.from_pretrained(path, num_labels=len(labels), **names)",
    ]


def _merged_usage(config: RunConfig) -> str:
    is_image = config.task.kind == "image-classification"
    variable, processor = ("processor", "AutoImageProcessor") if is_image else ("tokenizer", "AutoTokenizer")
    if is_plain_model(config.task):
        name, note = _CLASSES.get(config.task.kind, "AutoModelForSequenceClassification"), ""
        imports = f"from transformers import {name}, {processor}"
    else:
        name = "MeanPoolingClassifier"
        imports = f"from giva_core.models import {name}\nfrom transformers import AutoTokenizer"
        note = (
            "\n\nThe head is linear on the mean-pooled, normalised sentence vector times 10. `AutoModel` loads the "
            "encoder alone; `AutoModelForSequenceClassification` would put another head on it."
        )
    load = f'model = {name}.from_pretrained("this-folder")\n{variable} = {processor}.from_pretrained("this-folder")'
    return f"```python\n{imports}\n\n{load}\n```{note}"


def _lora_usage(adapter: Adapter) -> str:
    config = adapter.metadata.config
    kind = config.task.kind
    is_plain = is_plain_model(config.task)
    name = _CLASSES.get(kind, "AutoModelForSequenceClassification") if is_plain else "MeanPoolingClassifier"
    if kind in ANSWER_TASKS:
        load = f'base = {name}.from_pretrained("{config.model.path}")  # the base model'
        use = f"from peft import PeftModel\nfrom transformers import {name}\n\n{load}"
        return f'```python\n{use}\nmodel = PeftModel.from_pretrained(base, "this-folder")\n```'
    imports = ["from peft import PeftModel", "from transformers import AutoConfig"]
    if is_plain:
        imports[1] += f", {name}"
    else:
        imports.insert(0, f"from giva_core.models import {name}")
    code = [
        *imports,
        "",
        f'path = "{config.model.path}"  # the base model',
        *_labelled(config.task),
        f"base = {name}.from_pretrained(path, config=config)",
        'model = PeftModel.from_pretrained(base, "this-folder")',
    ]
    return "```python\n" + "\n".join(code) + "\n```"
