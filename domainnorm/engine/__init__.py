from .train import train

__all__ = ["train"]
