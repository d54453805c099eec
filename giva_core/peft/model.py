"""The tuner: which layers get an adapter, which bases they share, and what a saved adapter holds.

A saved adapter is PEFT's: `adapter_config.json`, and `adapter_model.safetensors` with, for every layer,
`<layer>.giva_lambda_o (d_out,)`, `<layer>.giva_lambda_s (r,)`, perhaps `<layer>.giva_A (r, d_in)`, `<layer>.giva_B
(d_out, r)`, perhaps `<layer>.giva_residual (d_out, r)`; and the digest of the bases, so that vectors are never put onto
other bases than those they were trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..bases import bases_digest
from ..errors import BasesError, ConfigError
from ..layer import check_bases, linear_shape
from ..types import Bases, BasesSet
from .config import GivaPeftConfig
from .layer import GivaLayer, Linear

_PREFIX, _DIGEST = "base_model.model.", "base_model.giva_digest"
_ALL_LINEAR = "all-linear"
#: The name that stands for no adapter in a mixed batch.
_BASE_MODEL = "__base__"


class GivaModel(BaseTuner):
    """A model with GiVA adapters.

    Args:
        model: The model to adapt, in place.
        config: `GivaPeftConfig`, by adapter name.
        adapter_name: The first adapter.

    Raises:
        BasesError: No bases, bases that do not fit a layer, or others than the adapter was trained on.
        TargetError: A target is not an `nn.Linear` or transformers' `Conv1D`.

    Source: arXiv:2604.21901.
    """

    prefix: str = "giva_"
    tuner_layer_cls = GivaLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (PEFT's attribute)

    # -- adding an adapter --------------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: GivaPeftConfig, model_config: dict[str, Any]) -> GivaPeftConfig:
        """Fill the settings from the bases, and refuse bases other than those the adapter was trained on."""
        bases = peft_config.bases
        if not isinstance(bases, BasesSet):
            if not peft_config.bases_digest:
                raise BasesError(
                    "a new adapter needs bases",
                    got="none",
                    expected="bases=, a BasesSet or a folder",
                    remedy="make them with GivaPeftConfig.calibrate(model, batches, r=8, target_modules=[...])",
                )
            return peft_config
        if peft_config.target_modules is None or peft_config.target_modules == _ALL_LINEAR:
            peft_config.target_modules = {name for name in bases.layers if peft_config.leaves_in(name)}
        used = self._used(peft_config, bases)
        digest = bases.digest if len(used) == len(bases.layers) else bases_digest(used, bases.init)
        _same_digest(digest, peft_config.bases_digest, "the settings are those of an adapter with other bases")
        ranks = {name: layer.A.shape[0] for name, layer in used.items()}
        r = max(ranks.values(), default=0)
        if peft_config.r not in (None, r):
            raise BasesError(
                "the bases have another rank", got=f"rank {r}", expected=f"r = {peft_config.r}", remedy="leave r out"
            )
        peft_config.r, peft_config.init, peft_config.bases_digest = r, bases.init, digest
        peft_config.ranks = {name: rank for name, rank in ranks.items() if rank != r}
        return peft_config

    def _used(self, config: GivaPeftConfig, bases: BasesSet) -> dict[str, Bases]:
        """The bases of the layers that the targets match."""
        names = [name for name, _ in self.model.named_modules() if self._check_target_module_exists(config, name)]
        if missing := [name for name in names if name not in bases.layers]:
            raise BasesError(
                f"there are no bases for '{missing[0]}'",
                got=f"bases of {len(bases.layers)} layers, the first being {next(iter(bases.layers), 'none')}",
                cause="target_modules matches more layers than were calibrated, or bases of another model",
                remedy="leave target_modules out, or calibrate for these layers",
            )
        return {name: bases.layers[name] for name in names}

    def _create_and_replace(
        self,
        peft_config: GivaPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        layer = target if isinstance(target, Linear) else Linear(target, current_key, adapter_name)
        A, B, waiting = self._bases_of(peft_config, adapter_name, layer, current_key)
        layer.update_layer(adapter_name, A, B, peft_config, waiting=waiting)
        if layer is not target:
            layer.train(target.training)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in another's place; PEFT's form asks each for a weight, which a head of several layers lacks."""
        setattr(parent, child_name, new_module)

    def _bases_of(
        self, config: GivaPeftConfig, adapter_name: str, layer: Linear, name: str
    ) -> tuple[Tensor, Tensor, bool]:
        """A and B of a layer, shared with an adapter that has the same; and whether they still wait for values."""
        for other, known in self.peft_config.items():
            same = isinstance(known, GivaPeftConfig) and known.bases_digest == config.bases_digest
            if same and other != adapter_name and other in layer.giva_A and other not in layer.waiting:
                return layer.giva_A[other], layer.giva_B[other], False
        if isinstance(config.bases, BasesSet):
            pair = config.bases.layers[name]
            check_bases(linear_shape(layer.get_base_layer(), name), pair.A, pair.B)
            return torch.tensor(pair.A), torch.tensor(pair.B), False
        if not config.save_bases:
            raise BasesError(
                "the adapter was saved without its bases",
                expected=f"bases with digest {config.bases_digest[:12]}…",
                cause="save_bases = false",
                remedy="give them: PeftModel.from_pretrained(model, folder, bases=...), or load an adapter with them",
            )
        r, most = config.rank_of(name), min(layer.in_features, layer.out_features)
        if not 0 < r <= most:  # before so much memory is asked for
            raise BasesError(
                f"'{name}' cannot have the rank that the adapter's settings name",
                got=r,
                expected=f"1 to {most}",
                cause="a damaged or foreign adapter_config.json",
            )
        return torch.zeros(r, layer.in_features), torch.zeros(layer.out_features, r), True

    # -- mixed batches ------------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of a forward call to every layer and head; called by `PeftModel`."""
        names: Sequence[str] | None = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ConfigError("adapter_names is for inference", remedy="call model.eval(), or train one adapter")
        if unknown := set(names) - {*self.peft_config, _BASE_MODEL}:
            raise ConfigError(f"there is no adapter '{min(unknown)}'", expected=", ".join(self.peft_config))
        hook = partial(_with_names, names=list(names), beams=kwargs.get("num_beams") or 1)
        layers = [m for m in self.modules() if isinstance(m, (GivaLayer, AuxiliaryTrainingWrapper))]
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # -- combining adapters -------------------------------------------------------------------------------------------

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "exact",
    ) -> None:
        """Add the adapter `ΔW = Σ_k w_k ΔW_k` of adapters on the same bases.

            S = Σ_k w_k (lambda_o,k lambda_s,kᵀ + R_k)  (d_out, r),      ΔW = (S ∘ B) A

        A module that one of the adapters trained whole, such as a head, is copied as it is, whatever the weight.

        Args:
            adapters: The adapters.
            weights: One number each, of any sign.
            adapter_name: The new adapter; it is not switched to.
            combination_type: `exact` keeps S as a frozen residual, `d_out · r` numbers, and starts new vectors on top;
                `svd` keeps the best vectors, `lambda_o lambda_sᵀ ≈ S`, of which there are only `d_out + r`.

        Raises:
            ConfigError: An unknown adapter or combination, a name that is taken, or heads that cannot be combined.
            BasesError: The adapters have different bases.
        """
        self._check_combination(adapters, weights, adapter_name, combination_type)
        exact = combination_type == "exact"
        configs = [self.peft_config[name] for name in adapters]
        whole = list(dict.fromkeys(module for config in configs for module in config.modules_to_save or ()))
        self.peft_config[adapter_name] = replace(
            configs[0], residual=exact, init_weights=True, modules_to_save=whole or None
        )
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for wrapper in self._wrappers():
            for owner in wrapper.modules_to_save.keys() & set(adapters):
                head = copy.deepcopy(wrapper.modules_to_save[owner])
                wrapper.modules_to_save[adapter_name] = head.requires_grad_(False)
        for layer in self.modules():
            if not isinstance(layer, GivaLayer) or adapter_name not in layer.giva_A:
                continue
            with torch.no_grad():
                S = torch.zeros_like(layer.giva_B[adapter_name])
                for adapter, weight in zip(adapters, weights, strict=True):
                    S += weight * torch.outer(layer.giva_lambda_o[adapter], layer.giva_lambda_s[adapter])
                    if adapter in layer.giva_residual:
                        S += weight * layer.giva_residual[adapter]
                if exact:
                    layer.giva_residual[adapter_name].copy_(S)
                    continue
                U, singular, Vh = torch.linalg.svd(S, full_matrices=False)
                # lambda_s has length √r and a positive sum, as it has at the start
                scale = len(Vh[0]) ** 0.5 * (1.0 if Vh[0].sum() >= 0 else -1.0)
                layer.giva_lambda_s[adapter_name].copy_(Vh[0] * scale)
                layer.giva_lambda_o[adapter_name].copy_(U[:, 0] * singular[0] / scale)

    def _check_combination(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
    ) -> None:
        if combination_type not in ("exact", "svd"):
            raise ConfigError("there is no such combination", got=f"'{combination_type}'", expected="exact or svd")
        if adapter_name in self.peft_config:
            raise ConfigError(f"there is an adapter '{adapter_name}' already", remedy="choose another name")
        if not adapters or len(adapters) != len(weights):
            raise ConfigError(
                "adapters and weights do not fit", got=f"{len(adapters)} and {len(weights)}", expected="one weight each"
            )
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ConfigError(f"there is no adapter '{unknown[0]}'", expected=", ".join(self.peft_config))
        digests = {self.peft_config[name].bases_digest for name in adapters}
        if len(digests) > 1:
            raise BasesError(
                "the adapters have different bases",
                got=" and ".join(sorted(digest[:12] for digest in digests)),
                expected="one digest",
                cause="vectors on different bases cannot be added",
            )
        if any(len(wrapper.modules_to_save.keys() & set(adapters)) > 1 for wrapper in self._wrappers()):
            raise ConfigError(
                "the adapters have each trained the same module whole",
                cause="heads of several adapters, which cannot be added",
                remedy="combine adapters of which at most one has modules_to_save",
            )

    def _wrappers(self) -> list[ModulesToSaveWrapper]:
        """The modules that some adapter trained whole."""
        return [module for module in self.modules() if isinstance(module, ModulesToSaveWrapper)]

    # -- saving and loading -------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: GivaPeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if not config.save_bases:
            found = {key: value for key, value in found.items() if ".giva_A." not in key and ".giva_B." not in key}
        digest = torch.tensor(list(bytes.fromhex(config.bases_digest)), dtype=torch.uint8)
        return {**found, f"{_DIGEST}.{adapter_name}": digest}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: GivaPeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = dict(state_dict)
        digest = state_dict.pop(_DIGEST, None)
        if digest is None:
            raise BasesError("the file does not tell the digest of its bases", cause="not a GiVA adapter, or damaged")
        saved = bytes(digest.tolist()).hex()
        _same_digest(saved, config.bases_digest, f"adapter '{adapter_name}' has other bases than the weights to load")
        matrices = _matrices(state_dict)
        if matrices:
            _same_digest(bases_digest(matrices, config.init), saved, "the bases in the file are damaged")
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, GivaLayer) and adapter_name in module.giva_A
        }
        if not matrices and any(adapter_name in layer.waiting for layer in layers.values()):
            raise BasesError(
                f"the weights of adapter '{adapter_name}' come without bases",
                expected=f"bases with digest {saved[:12]}…",
                remedy="give them: PeftModel.from_pretrained(model, folder, bases=...)",
            )
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, layer in layers.items():
            layer.waiting.discard(adapter_name)
            if not matrices:  # those in the model are the right ones: nothing is missing
                mapped[f"{name}.giva_A.{adapter_name}"] = layer.giva_A[adapter_name]
                mapped[f"{name}.giva_B.{adapter_name}"] = layer.giva_B[adapter_name]
        return mapped


def _matrices(state_dict: dict[str, Tensor]) -> dict[str, Bases]:
    """The bases in a checkpoint, by layer name."""
    ends = [key.removesuffix(".giva_A") for key in state_dict if key.endswith(".giva_A")]
    names = [name for name in ends if f"{name}.giva_B" in state_dict]
    return {
        name.removeprefix(_PREFIX): Bases(
            state_dict[f"{name}.giva_A"].float().cpu().numpy(), state_dict[f"{name}.giva_B"].float().cpu().numpy()
        )
        for name in names
    }


def _same_digest(got: str, expected: str, what: str) -> None:
    if expected and got != expected:
        raise BasesError(
            what,
            got=f"bases digest {got[:12]}…",
            expected=f"{expected[:12]}…",
            cause="bases of another calibration, model, seed or set of layers",
            remedy="use the bases that the adapter was trained on",
        )


def _with_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Collection[str], beams: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook: beam search repeats every example, but not what an encoder reads."""
    if args and args[0].shape[0] == beams * len(names):
        names = [name for name in names for _ in range(beams)]
    return args, {**kwargs, "adapter_names": names}
