"""GiVA as a method of PEFT: importing this package registers it.

    import giva_core.peft
    config = giva_core.peft.GivaPeftConfig.calibrate(model, batches, r=8)
    model = peft.get_peft_model(model, config)

From then on everything is PEFT's: `save_pretrained`, `PeftModel.from_pretrained`, several adapters with `set_adapter`,
`disable_adapter`, `merge_and_unload`, `add_weighted_adapter`, `adapter_names` in a mixed batch. What differs from its
other methods are the bases: they come from a gradient, so they cannot be drawn again. A saved adapter brings them
along, or names their digest and has to be given them (`GivaPeftConfig.save_bases`).

Gangwar et al., "GiVA: Gradient-Informed Bases for Vector-Based Adaptation", arXiv:2604.21901.
"""

from __future__ import annotations

from ..errors import DependencyError

try:
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import PeftType, register_peft_method

    if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        raise ImportError("this version of PEFT has no hook for loading a method's own state")
except ImportError as error:
    raise DependencyError(
        "giva_core.peft needs PEFT 0.21 or newer", got=error, remedy="pip install 'fedgiva[peft]'"
    ) from None

NAME = "giva"


def _add_to(kinds: type[PeftType], name: str) -> None:
    """Make `name` a member of PEFT's list of methods, which register_peft_method asks but does not extend."""
    if name in kinds.__members__:
        return
    member = str.__new__(kinds, name)
    member._name_ = member._value_ = name
    type.__setattr__(kinds, name, member)
    kinds._member_names_.append(name)
    kinds._member_map_[name] = kinds._value2member_map_[name] = member


_add_to(PeftType, NAME.upper())

from .config import GivaPeftConfig  # noqa: E402  (its defaults need the member)
from .layer import GivaLayer, Linear  # noqa: E402
from .model import GivaModel  # noqa: E402

register_peft_method(name=NAME, config_cls=GivaPeftConfig, model_cls=GivaModel, prefix="giva_")

__all__ = ["GivaLayer", "GivaModel", "GivaPeftConfig", "Linear"]
