"""Whether encoders still tell things apart: spread and effective rank of their features, and a word if they do not."""

from __future__ import annotations

from collections.abc import Mapping

import torch

MOST_VECTORS, LEAST_VECTORS = 512, 16
_RECORDS, _STEPS = 3, 100  # in a row, and between the first and the last of them, before a word is said


def sample_vectors(features: torch.Tensor) -> torch.Tensor:
    """At most ``MOST_VECTORS`` feature vectors (N, C) of a feature map (B, C, H, W), taken evenly; no gradient."""
    vectors = features.detach().permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    count = min(len(vectors), MOST_VECTORS)
    rows = torch.arange(count, device=vectors.device) * len(vectors) // max(1, count)
    return vectors[rows].float()


def feature_std(vectors: torch.Tensor) -> float:
    """Standard deviation over the L2-normalised ``vectors`` (N, C), averaged over channels, times sqrt(C).

    1 when directions are spread evenly, near 0 when all are alike (Chen & He, arXiv 2011.10566).
    """
    unit = torch.nn.functional.normalize(vectors, dim=1)
    return float(unit.std(dim=0, correction=0).mean()) * vectors.shape[1] ** 0.5


def rankme(vectors: torch.Tensor) -> float:
    """Effective rank of ``vectors`` (N, C), from 1 to min(N, C): exp of the entropy of their singular values.

    RankMe (Garrido et al., arXiv 2210.02885). It is low also where N is.
    """
    rows, columns = vectors.shape
    wide = vectors.double()
    gram = wide @ wide.T if rows < columns else wide.T @ wide
    values = torch.linalg.eigvalsh(gram.cpu()).clamp_min(0).sqrt()
    shares = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(shares).sum().exp())


class CollapseMonitor:
    """Notices encoders whose features are nearly alike everywhere. Says so once for each.

    Args:
        least_std: of ``feature_std``; 0 never warns.
        least_rank: of ``rankme``; 0 never warns.
    """

    def __init__(self, least_std: float, least_rank: float) -> None:
        self._least = {"feature_std": least_std, "rankme": least_rank}
        self._since: dict[str, list[int]] = {}  # steps of records in a row that were low
        self._told: set[str] = set()

    def messages(self, values: Mapping[str, float], step: int) -> list[str]:
        """What to tell the user after the record of a step that holds ``feature_std/NAME`` and ``rankme/NAME``."""
        found = []
        for name in {key.partition("/")[2] for key in values if key.startswith("feature_std/")} - self._told:
            low = [
                f"{kind} {values[f'{kind}/{name}']:.3g}"
                for kind, least in self._least.items()
                if values.get(f"{kind}/{name}", least) < least
            ]
            if not low:
                self._since[name] = []
                continue
            since = self._since.setdefault(name, [])
            since.append(step)
            if len(since) >= _RECORDS and step - since[0] >= _STEPS:
                self._told.add(name)
                found.append(
                    f"features of {name} may be collapsing: {', '.join(low)}, low in every record since step "
                    f"{since[0]} (engine.least_feature_std, engine.least_rankme); a lower "
                    "engine.optimizer.learning_rate or a longer warm-up would help"
                )
        return sorted(found)
