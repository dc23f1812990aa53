"""List FLAIR-HUB's zips on the Hugging Face hub, and choose some by domain and modality."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bocage.shards.errors import InputError
from bocage.shards.source.flair_hub import naming
from bocage.shards.source.flair_hub.metadata import METADATA_FOLDER

REPOSITORY = "IGNF/FLAIR-HUB"
"""Dataset repository of FLAIR-HUB on the hub."""

_ZIP = ".zip"
_LIST_ATTEMPTS = 3
_MAX_BACKOFF = 30.0
_NAMES_SHOWN = 12

_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class RemoteZip:
    """One zip on the hub.

    Attributes:
        name: file name, e.g. ``D012-2019_AERIAL_RGBI.zip``.
        url: address at a fixed commit.
        size: size in bytes.
        digest: SHA-256 in hexadecimal; for a small file outside of git LFS, the SHA-1 of its git blob. Empty if the
            server has no hash: the CRC-32 of the members is checked instead.
    """

    name: str
    url: str
    size: int
    digest: str

    @property
    def is_metadata(self) -> bool:
        """Whether this is the zip of the dates and splits."""
        return self.name == METADATA_FOLDER + _ZIP

    @property
    def department(self) -> str:
        """Department, e.g. ``D012``; empty for metadata."""
        return self._part("department")

    @property
    def domain(self) -> str:
        """Domain, e.g. ``D012-2019``; ``D012-195X`` for historical images, empty for metadata."""
        return f"{self._part('department')}-{self._part('year')}".strip("-")

    @property
    def modality(self) -> str:
        """Name of the modality; the name without ``.zip`` for metadata and the toy subset."""
        return self._part("modality") or self.name.removesuffix(_ZIP)

    def _part(self, name: str) -> str:
        match = naming.FOLDER.fullmatch(self.name.removesuffix(_ZIP))
        return match[name] if match else ""


def list_zips(repository: str = REPOSITORY, revision: str | None = None) -> list[RemoteZip]:
    """List the zips of a repository that are named as those of FLAIR-HUB: metadata first, then by name.

    The environment variables of huggingface_hub apply, such as HF_ENDPOINT and HF_TOKEN.

    Args:
        repository: dataset repository, ``org/name``.
        revision: branch, tag or commit; None is the default branch.

    Raises:
        InputError: the hub cannot be reached or refuses access, the repository or the revision does not exist, or
            there is no such zip.
    """
    # Imported here, because it takes a tenth of a second.
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(library_name="bocage")
    at = f" at {revision}" if revision else ""
    try:
        commit = retried(lambda: api.dataset_info(repository, revision=revision).sha, repository + at, _LIST_ATTEMPTS)
        entries = retried(
            lambda: list(api.list_repo_tree(repository, recursive=True, revision=commit, repo_type="dataset")),
            repository + at,
            _LIST_ATTEMPTS,
        )
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no name of a repository; give org/name, e.g. {REPOSITORY}") from error
    found: dict[str, RemoteZip] = {}
    for entry in entries:
        name = entry.path.rpartition("/")[2]
        is_named = naming.FOLDER.fullmatch(name.removesuffix(_ZIP)) or name == METADATA_FOLDER + _ZIP
        if isinstance(entry, RepoFile) and name.endswith(_ZIP) and is_named:
            url = hf_hub_url(repository, entry.path, repo_type="dataset", revision=commit)
            digest = entry.blob_id if entry.lfs is None else entry.lfs.sha256
            found.setdefault(name, RemoteZip(name, url, entry.size, digest))
    if not found:
        raise InputError(f"{repository}{at}: holds no zips like D012-2019_AERIAL_RGBI.zip; give another repository")
    return sorted(found.values(), key=lambda item: (not item.is_metadata, item.name))


def choose_zips(
    zips: Sequence[RemoteZip], domains: Sequence[str] | None = None, modalities: Sequence[str] | None = None
) -> list[RemoteZip]:
    """Choose zips by domain and modality; metadata are always chosen.

    Args:
        zips: zips to choose from.
        domains: domains such as ``D012-2019``, each with the historical images of its department; None is all.
        modalities: names of modalities; None is all.

    Raises:
        InputError: a domain or modality has no zip (the message suggests similar names), or no zip has both.
    """
    known_domains = sorted({item.domain for item in zips if not _is_historical(item) and not item.is_metadata})
    known_modalities = sorted({item.modality for item in zips if not item.is_metadata})
    _check_names("domain", domains or (), known_domains)
    _check_names("modality", modalities or (), known_modalities)
    departments = {domain.partition("-")[0] for domain in domains or ()}
    chosen = []
    for item in zips:
        in_domain = domains is None or (
            item.department in departments if _is_historical(item) else item.domain in domains
        )
        if item.is_metadata or (in_domain and (modalities is None or item.modality in modalities)):
            chosen.append(item)
    if all(item.is_metadata for item in chosen):
        raise InputError(f"no zip of {', '.join(modalities or ())} in {', '.join(domains or ())}; choose others")
    return chosen


def retried(
    action: Callable[[], _Result],
    name: str,
    attempts: int,
    *,
    progress: Callable[[], int] = lambda: 0,
    wait: Callable[[float], object] = time.sleep,
) -> _Result:
    """Call ``action`` until it raises no network error, with exponential backoff, and return its result.

    Args:
        action: function that uses the network.
        name: name of what is fetched, for messages.
        attempts: consecutive failures without progress after which to give up.
        progress: number that grows when a failed call has made progress.
        wait: function that waits for some seconds.

    Raises:
        InputError: the server refuses the request, or all attempts failed; the message says why.
    """
    failures, reached = 0, progress()
    while True:
        try:
            return action()
        except Exception as error:
            if not _is_network_error(error):
                raise
            # The text of the error may hold a signed address: show only the reason.
            reason, advice = _explain(error)
        failures = 1 if progress() > reached else failures + 1
        reached = progress()
        if advice or failures >= attempts:
            raise InputError(f"{name}: {reason}; {advice or 'run the same command again later'}")
        seconds = min(2.0 ** (failures - 1), _MAX_BACKOFF)
        _logger.info("%s: %s; trying again in %.0f s", name, reason, seconds)
        wait(seconds)


def _is_historical(item: RemoteZip) -> bool:
    return item.domain.endswith(f"-{naming.HISTORICAL_YEAR}")


def _check_names(kind: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names without a zip, and suggest similar ones."""
    for name in names:
        if name not in known:
            upper = name.upper()
            near = [other for other in known if upper in other][:3] or difflib.get_close_matches(upper, known)
            more = f" and {len(known) - _NAMES_SHOWN} more" if len(known) > _NAMES_SHOWN else ""
            listed = f"known ones: {', '.join(known[:_NAMES_SHOWN])}{more}"
            hint = f"did you mean {' or '.join(near)}?" if near else listed
            raise InputError(f"unknown {kind} {name!r}; {hint}")


def _is_network_error(error: Exception) -> bool:
    # httpx, which newer versions of huggingface_hub use, derives its errors from its own HTTPError only.
    return isinstance(error, OSError) or any(kind.__name__ == "HTTPError" for kind in type(error).__mro__)


def _explain(error: Exception) -> tuple[str, str]:
    """Reason of a failed request, without addresses, and advice; no advice if another attempt may succeed."""
    kind = type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if kind == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set", "unset it to download"
    if kind == "GatedRepoError":
        return "access is restricted", "accept the terms on its page, and set HF_TOKEN or run `hf auth login`"
    if kind == "RevisionNotFoundError":
        return "the repository has no such revision", "check --revision"
    if kind == "RepositoryNotFoundError":
        return "no such dataset on the hub, or a private one", "check its name, or set HF_TOKEN for a private one"
    if status in (404, 410):
        return "not found on the server", "check that it still exists"
    if status in (401, 403):
        return f"access refused (HTTP status {status})", "check HF_TOKEN, or log in with `hf auth login`"
    if status is not None:
        is_final = 400 <= status < 500 and status not in (408, 425, 429)
        return f"HTTP status {status}", "report it" if is_final else ""
    if "Timeout" in kind:
        return "no answer in time", ""
    if kind.startswith("Connect"):
        return "the server cannot be reached: no network, or a wrong HF_ENDPOINT", ""
    if kind == "OSError":  # http_get compares sizes
        return "the content has another size than the hub says", ""
    return f"connection lost ({kind})", ""
