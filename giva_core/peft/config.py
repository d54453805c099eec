"""The configuration of a GiVA adapter in PEFT, and the calibration that bases come from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import PeftType
from peft.utils.constants import SEQ_CLS_HEAD_NAMES

from ..adapt import calibrate
from ..checkpoint import load_bases
from ..config import GivaConfig
from ..errors import TargetError
from ..sketch import LossFunction
from ..targets import find_targets
from ..types import BasesSet

if TYPE_CHECKING:
    from torch import nn


@dataclass
class GivaPeftConfig(PeftConfig):
    """Settings of one GiVA adapter: `W' = W + diag(lambda_o) · B · diag(lambda_s) · A`.

    Args:
        r: The rank; None reads it from the bases.
        target_modules: Names or endings of the layers to adapt, or a regular expression; None or `all-linear`: all
            layers that the bases have.
        exclude_modules: Names, endings or a regular expression of layers that are not adapted, as in `LoraConfig`.
        layers_to_transform: Numbers of the blocks that are adapted, as in `LoraConfig`; None: all.
        layers_pattern: What the list of blocks is called, where a name has several numbers.
        modules_to_save: Modules trained and saved whole besides the vectors, such as a head.
        giva_dropout: Dropout on the adapter's input, while training.
        init_weights: True starts `lambda_o` at 0, so that the adapter changes nothing yet; False at random numbers.
        save_bases: Save A and B with the vectors. False keeps an adapter at `d_out + r` numbers a layer; whoever
            loads it has to have the bases: `PeftModel.from_pretrained(model, folder, bases=...)`, or an adapter with
            the same ones in the model already.
        bases: A `BasesSet`, or the folder of a `bases.safetensors`, which may be a whole adapter of this project. It
            is not saved with the settings, and saved settings that name a folder are not followed.
        init: How B was made; read from the bases.
        seed: The seed that the bases came from; for the record.
        ranks: Rank by layer, where it is not `r`; read from the bases.
        bases_digest: SHA-256 of the bases; read from them. An adapter that was trained on other bases is refused.
        residual: Frozen coefficients R are added, `(lambda_o lambda_sᵀ + R) ∘ B`; `add_weighted_adapter` sets this.
    """

    r: int | None = field(default=None, metadata={"help": "Rank; None reads it from the bases."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Layers to adapt; None: all that the bases have."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Layers that are not adapted."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the blocks to adapt; None: all."}
    )
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "What the blocks' list is called."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    giva_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    init_weights: bool = field(default=True, metadata={"help": "Start with an adapter that changes nothing."})
    save_bases: bool = field(default=True, metadata={"help": "Save A and B with the vectors."})
    bases: BasesSet | str | Path | None = field(
        default=None, repr=False, compare=False, metadata={"help": "The bases, or a folder that has them."}
    )
    init: str = field(default="rand", metadata={"help": "How B was made; read from the bases."})
    seed: int = field(default=0, metadata={"help": "The seed that the bases came from."})
    ranks: dict[str, int] = field(default_factory=dict, metadata={"help": "Rank by layer where it is not r."})
    bases_digest: str = field(default="", metadata={"help": "SHA-256 of the bases."})
    residual: bool = field(default=False, metadata={"help": "Frozen coefficients are added to lambda_o lambda_sᵀ."})

    def __post_init__(self) -> None:
        is_saved = self.peft_type is not None  # type: ignore[has-type]  # new settings do not name it
        super().__post_init__()
        self.peft_type = PeftType.GIVA
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.bases, (str, Path)):
            # saved settings may be anybody's: they name no place on this machine to read from
            self.bases = None if is_saved else load_bases(self.bases)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        subfolder: str | None = None,
        bases: BasesSet | str | Path | None = None,
        **kwargs: Any,
    ) -> GivaPeftConfig:
        """As PEFT's, with the bases of an adapter that was saved without them."""
        config: GivaPeftConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if bases is not None:
            config.bases = bases if isinstance(bases, BasesSet) else load_bases(bases)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The settings without the bases."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "bases"}

    def rank_of(self, layer: str) -> int:
        """The rank of one layer."""
        return self.ranks.get(layer, self.r or 0)

    def leaves_in(self, layer: str) -> bool:
        """Whether `exclude_modules` and `layers_to_transform` leave a layer in, which was named by its whole name."""
        ending = replace(self, target_modules=[layer.rpartition(".")[2]])  # PEFT asks a whole name for no block
        return bool(check_target_module_exists(ending, layer))

    @classmethod
    def calibrate(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        loss_fn: LossFunction | None = None,
        *,
        giva: GivaConfig | None = None,
        **settings: Any,
    ) -> GivaPeftConfig:
        """Settings with bases from the gradient of `model` on a few batches.

        Args:
            model: The plain model at its starting weights; it is left as it was.
            batches: The calibration batches, a list: they are iterated once for each pass. One batch often suffices.
            loss_fn: Returns the SUM of the losses of a batch's examples, and their number. Without: `model(**batch)`
                returns the mean loss, as transformers' models do where the batch has labels.
            giva: Rank, targets, init, seed and passes; default `GivaConfig(rank=r, target_modules=target_modules)`.
            **settings: Fields of this class.

        Returns:
            Settings ready for `get_peft_model`.

        Raises:
            TargetError: The targets match nothing, or cannot be adapted.
            BasesError: The gradient has too low a rank.
            NumericsError: The loss or a sketch is not finite.
        """
        if giva is None:
            targets = settings.get("target_modules") or "all-linear"
            targets = targets if isinstance(targets, str) else tuple(sorted(targets))
            known = {key: settings[key] for key in ("init", "seed") if key in settings}
            giva = GivaConfig(rank=settings.get("r") or 8, target_modules=targets, **known)
        heads = list(settings.get("modules_to_save") or [])
        if settings.get("task_type") == "SEQ_CLS":  # PEFT trains and saves these without being asked
            heads += [name for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)]
        chosen = cls(**{**settings, "r": None, "target_modules": None})
        if chosen.exclude_modules or chosen.layers_to_transform is not None:
            named = (name for name, _ in find_targets(model, giva.target_modules, heads))
            giva = replace(giva, target_modules=tuple(name for name in named if chosen.leaves_in(name)))
            if not giva.target_modules:
                raise TargetError(
                    "exclude_modules and layers_to_transform leave no target", remedy="name fewer, or other ones"
                )
        chosen.bases, chosen.seed = calibrate(model, batches, loss_fn or _mean_loss, giva, exclude=heads), giva.seed
        return chosen


def _mean_loss(model: nn.Module, batch: Any) -> tuple[Any, int]:
    """The loss that a transformers model returns, summed again."""
    examples = len(next(iter(batch.values())))
    return model(**batch).loss * examples, examples
