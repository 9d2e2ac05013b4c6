"""Which features the fusion layer reads: given by a setting, or solved by their widths."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

from mobile_vla_inference.errors import CheckpointError
from mobile_vla_inference.policy.storage.config import FUSION_FEATURES, HybridConfig
from mobile_vla_inference.policy.storage.settings import PolicySettings

#: The combinations that the published notes describe; they have priority if another sum of widths fits too.
_DOCUMENTED_FUSIONS = (("kosmos_text", "clip_text"), ("kosmos_text", "clip_text", "clip_image"))


def solve_fusion_features(config: HybridConfig, settings: PolicySettings | None = None) -> tuple[str, ...]:
    """Return the features that the fusion layer (the LSTM, in the pure variant) reads, in order.

    The setting `fusion_features` decides. Without it, the documented combinations (Kosmos text and CLIP text, then with
    the CLIP image) are tried, and then all others: one combination must have widths that add up.

    Raises:
        CheckpointError: the widths of the setting don't add up, or no combination does, or more than one.
    """
    settings = settings or PolicySettings()
    expected = config.cell.input_size if config.fusion_in is None else config.fusion_in
    widths = dict(config.feature_widths)
    if config.clip_text is not None and settings.clip_text_feature == "pooled":
        widths["clip_text"] = config.clip_text.hidden_size

    def fits(names: Iterable[str]) -> bool:
        return all(name in widths for name in names) and sum(widths[name] for name in names) == expected

    reader = "the recurrent layer reads" if config.fusion_in is None else "the fusion layer reads"
    known = ", ".join(f"{name} {width}" for name, width in widths.items())
    if settings.fusion_features is not None:
        if not fits(settings.fusion_features):
            raise CheckpointError(
                f"setting fusion_features is {list(settings.fusion_features)}, but {reader} {expected} values, "
                f"expected features of this checkpoint ({known}) that add up to it; correct it in policy.json"
            )
        return settings.fusion_features
    documented = (("kosmos_text",),) if config.fusion_in is None else _DOCUMENTED_FUSIONS
    for names in documented:
        if fits(names):
            return names
    candidates = [
        names
        for count in range(1, len(FUSION_FEATURES) + 1)
        for names in combinations(FUSION_FEATURES, count)
        if fits(names)
    ]
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise CheckpointError(
            f"{reader} {expected} values, which no combination of features gives, expected a sum of {known}; "
            f"check that it is the right file"
        )
    listed = " or ".join(" + ".join(names) for names in candidates)
    raise CheckpointError(
        f"{reader} {expected} values, which {len(candidates)} combinations of features give, expected one: {listed}; "
        f"name the right one in the setting fusion_features in policy.json"
    )
