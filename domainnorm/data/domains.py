"""The domain of each data set of a config, said in its targets."""

from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch.utils.data import Dataset

from .catalog import VALIDATION, split_name


def domain_names(cfg: CfgNode) -> list[str]:
    """The names of `DATASETS.DOMAINS`, each once: domain k is the k-th. Empty: data sets have no domains."""
    return list(dict.fromkeys(cfg.DATASETS.DOMAINS))


def training_domains(cfg: CfgNode) -> list[int]:
    """The domain of each of `DATASETS.TRAIN`; all 0 if they have none."""
    names = domain_names(cfg)
    return [names.index(domain) for domain in cfg.DATASETS.DOMAINS] or [0] * len(cfg.DATASETS.TRAIN)


def domain_of(cfg: CfgNode, name: str) -> int:
    """The domain of data set `name` in evaluation: what `TEST_DOMAINS` says, else `DOMAINS`; -1 if it is unknown."""
    # Not strict: either list may be empty.
    training = dict(zip(_locations(cfg.DATASETS.TRAIN), cfg.DATASETS.DOMAINS, strict=False))
    tested = dict(zip(_locations(cfg.DATASETS.TEST), cfg.DATASETS.TEST_DOMAINS, strict=False))
    held_out = {whole + VALIDATION: domain for whole, domain in training.items()}
    domain, names = (held_out | training | tested).get(split_name(name)[1], ""), domain_names(cfg)
    return names.index(domain) if domain else -1


def _locations(entries: list[str]) -> list[str]:
    return [split_name(entry)[1] for entry in entries]


class WithDomain(Dataset[Any]):
    """A data set whose targets say its domain: `domain`, int64 ()."""

    def __init__(self, dataset: Any, domain: int) -> None:
        self.dataset = dataset
        self.domain = domain

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, Any]]:
        image, target = self.dataset[index]
        return image, target | {"domain": torch.tensor(self.domain)}
