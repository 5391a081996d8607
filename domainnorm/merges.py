"""Merges of means and variances, differentiable to any order on one rank; what `Moments` is made of."""

import torch
from torch.autograd import Function

from .distributed import all_gather_stack, all_reduce_sum


class Merge(Function):
    """Mean and variance of the union of sets along `dim`, kept with size 1; each set has its share of the count."""

    @staticmethod
    def forward(ctx, share, mean, var, dim):
        merged = (share * mean).sum(dim, keepdim=True)
        apart = mean - merged
        ctx.save_for_backward(share, mean, merged)
        return merged, torch.addcmul(var, apart, apart).mul_(share).sum(dim, keepdim=True)

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        share, mean, merged = ctx.saved_tensors
        to_var = share * grad_var
        return None, torch.addcmul(share * grad_mean, mean - merged, to_var, value=2), to_var, None


class MergeBlocks(Function):
    """Means and variances (R, C) of equal counts -> of each block, (R / rows, C / channels), or of each set's block."""

    @staticmethod
    def forward(ctx, mean, var, rows, channels, spread):
        ctx.save_for_backward(mean)
        ctx.spread = spread
        ctx.blocks = (mean.numel() // (mean.shape[-1] * rows), rows, mean.shape[-1] // channels, channels)
        mean, var = mean.view(ctx.blocks), var.view(ctx.blocks)
        merged = mean.mean((1, 3), keepdim=True)
        apart = mean - merged
        var = torch.addcmul(var, apart, apart).mean((1, 3), keepdim=True)
        if spread:
            merged, var = (v.expand_as(mean).contiguous() for v in (merged, var))  # torch's kernels read it as such
        return merged.flatten(2).flatten(0, 1), var.flatten(2).flatten(0, 1)

    @staticmethod
    def backward(ctx, *grads):
        (mean,) = ctx.saved_tensors
        of = mean.view(ctx.blocks)
        blocks, rows, groups, channels = ctx.blocks
        whole = ctx.blocks if ctx.spread else (blocks, 1, groups, 1)
        grad_mean, grad_var = (g.reshape(whole).sum((1, 3), keepdim=True) / (rows * channels) for g in grads)
        apart = of - of.mean((1, 3), keepdim=True)
        grad_mean = torch.addcmul(grad_mean, apart, grad_var, value=2)
        return grad_mean.view(mean.shape), grad_var.expand_as(of).reshape(mean.shape), None, None, None


class MergeRanks(Function):
    """Moments (K, 1), (K, C), (K, C) of this rank -> of all ranks."""

    @staticmethod
    def forward(ctx, count, mean, var, group):
        everyone = all_gather_stack(torch.cat([count, mean, var], dim=1), group)  # (W, K, 1 + 2C)
        counts, means, variances = everyone.split([1, mean.shape[1], mean.shape[1]], dim=2)
        total = counts.sum(0)
        total_mean, total_var = (v[0] for v in Merge.apply(counts / total.clamp(min=1), means, variances, 0))
        ctx.save_for_backward(count / total.clamp(min=1), mean - total_mean)
        ctx.mark_non_differentiable(total)
        ctx.group = group
        return total, total_mean, total_var

    @staticmethod
    def backward(ctx, _, grad_mean, grad_var):
        if torch.is_grad_enabled():  # create_graph=True: second derivatives over ranks would be silently wrong
            raise RuntimeError("double backward is not implemented for moments merged over ranks: use sync=False")
        share, offset = ctx.saved_tensors
        grad_mean, grad_var = all_reduce_sum(torch.stack([grad_mean, grad_var]), ctx.group)
        return None, share * (grad_mean + 2 * offset * grad_var), share * grad_var, None
