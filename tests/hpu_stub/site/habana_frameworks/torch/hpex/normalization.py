"""FusedClipNorm: the norm is a tensor of one element, as the vendor's is."""

import torch

from tests.hpu_stub.journal import note


class FusedClipNorm:
    def __init__(self, parameters, max_norm):
        self.max_norm = max_norm

    @torch.no_grad()
    def clip_norm(self, parameters):
        note("clip FusedClipNorm")
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        for g in gradients:
            g.mul_((self.max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm.reshape(1)
