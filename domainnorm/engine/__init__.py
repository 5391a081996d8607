from .hooks import HookBase
from .train import train

__all__ = ["HookBase", "train"]
