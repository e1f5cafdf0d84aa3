"""A small mask-conditional latent diffusion with many defects, its config and its log: our own re-creation."""

from __future__ import annotations

from pathlib import Path

from rqvae.health.examine import Examination, examine
from rqvae.health.readers import read_log
from rqvae.health.settings import read_settings
from rqvae.health.source import read_source

MODEL = """
import torch
from functools import partial
from torch import nn
import torch.nn.functional as F

def stretch(picture):
    return picture * 2.0 - 1.0

class TileAttention(nn.Module):
    def forward(self, features, tissue):
        k = tissue.shape[-1] // features.shape[-1]
        inside = F.max_pool2d(tissue.float(), k)
        query = self.query((inside.repeat(1, 8, 1, 1) > 0).float())
        return torch.einsum("bci,bcj->bij", query, features).softmax(dim=-1)

class Net(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.table = nn.Embedding(classes, width)

    def guided(self, x, t, tissue, strength):
        with_it = self.forward(x, t, tissue)
        without = self.forward(x, t, torch.zeros_like(tissue).int())
        return without + (with_it - without) * strength

class Noising(nn.Module):
    def denoise(self, x, t, tissue, hold=False):
        limit = partial(torch.clamp, min=-1.0, max=1.0) if hold else (lambda y: y)
        return limit(self.start(x, self.net.guided(x, t, tissue, 3.0)))

    def step(self, x, t, tissue):
        return self.denoise(x, t, tissue, hold=True)

    def objective(self, start, t, tissue):
        wanted = torch.randn_like(start)
        guess = self.net(self.mix(start, t, wanted), t, tissue)
        guess = torch.nan_to_num(guess)
        wanted = torch.nan_to_num(wanted)
        return self.distance(guess, wanted).mean()

    def forward(self, pictures, tissue):
        t = torch.randint(0, 1000, (len(pictures),))
        return self.objective(stretch(pictures), t, tissue)
"""
PROGRAM = """
import torch
import yaml
from ema_pytorch import EMA
from sklearn.model_selection import train_test_split
from torch.optim.lr_scheduler import OneCycleLR

def sort_by_class(table):
    lists = {}
    for name, labels in table:
        for label in labels:
            lists[label].append(name)
    return lists

def divide(lists, count):
    train, test = {}, {}
    for i in range(count):
        train[i], test[i] = train_test_split(lists[i], train_size=0.9)
    return train, test

def thresholds(chosen, share):
    if not chosen:
        return torch.tensor([1.0])
    parts = [1.0 - share] + [share / (len(chosen) + 1)] * (len(chosen) + 1)
    return torch.tensor(parts).cumsum(0)

class Runner:
    def __init__(self, model, train_lr=1e-4, train_num_steps=10, num_workers=0, batch_size=4):
        self.model = model
        self.total = train_num_steps
        self.rate = train_lr
        self.scheduler = OneCycleLR(self.optimizer, max_lr=train_lr, total_steps=train_num_steps)
        self.average = EMA(model, beta=0.995)
        self.loader = self.make_loader(batch_size)

    def resume(self, state):
        self.model.load_state_dict(state)
        left = self.total - self.done
        self.scheduler = OneCycleLR(self.optimizer, max_lr=self.rate, total_steps=left)

    def train_step(self, pictures, tissue):
        latents = self.vae.encode(pictures).latent_dist.sample() * 0.18215
        loss = self.model(latents, tissue)
        self.writer.add_scalar("lr", self.scheduler.get_lr()[0])
        return loss

    def show(self):
        pictures, tissue = next(self.test_loader)
        shown = pictures * 0.5 + 0.5
        latents = self.average.sample(tissue) / 0.18215
        samples = torch.clip(self.vae.decode(latents).sample, -1, 1)
        return shown, samples * 0.5 + 0.5

def main(path):
    config = yaml.safe_load(open(path))
    settings = config["training"]
    size = settings["batch_size"]
    return Runner(None, train_lr=settings["lr"], train_num_steps=settings["train_num_steps"], batch_size=size)

def main_namespace(settings):
    return Runner(None, num_workers=settings.num_workers)
"""
CONFIG = (
    "training:\n  lr: 0.0001\n  train_num_steps: 2\n  batch_size: 4\n  num_workers: 16\n  save_and_sample_every: 2\n"
)
DRAW = """
=== Data Selection Details [DatasetLung.unbalanced_data()] ===
Selected class index: 2
Class size: 38244
Selected sample index: 28659

=== Image Loading Details [DatasetLung.unbalanced_data()] ===
Image metadata:
  Std: 52.81

Mask metadata:
  Value counts:
    0: 50000
    2: 170000
    3: 3000
    4: 39144
"""
LOG = """/env/lib/python3.10/site-packages/diffusers/models/modeling_utils.py:107: FutureWarning: Using `torch.load`
=== Model Summary [main()] ===
Total parameters: 172,101,124

=== Dataset Splitting [split_dataset()] ===
Train set summary: [58389, 58041, 38244, 36493, 41360]

=== Cutoff Probabilities [DatasetLung._cutoffs()] ===
Conditional drop probability: 1.0
Individual probabilities: [0.0, 0.25, 0.25, 0.25, 0.25]
\rloss: 1.1548:   0%|          | 0/2 [00:01<?, ?it/s]\rloss: 1.1548:  50%|#####     | 1/2 [00:01<00:01,  1.32s/it]\
\rloss: 2.6852:  50%|#####     | 1/2 [00:01<00:01,  1.32s/it]\rloss: 2.6852: 100%|#####| 2/2 [01:15<00:00, 37.76s/it]

=== Image Loading Details [DatasetLung.unbalanced_data()] ===
Image metadata:
  Std: 1.74

=== Training Loop Image Details [Trainer.train_loop()] ===
Input images metadata:
  Value range: [0.00, 1.00]

=== Diffusion Step Info [GaussianDiffusion.p_losses()] ===
Timestep: tensor([461, 266, 576, 891], device='cuda:0')
Size of masks: torch.Size([4, 1, 512, 512])
Value of classes distribution: tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4], [1., 0., 0., 0.], [1., 0., 0., 0.]])
=== Model Predictions [GaussianDiffusion.p_losses()] ===
Size of masks: torch.Size([4, 1, 64, 64])
Value of classes distribution: tensor([[0.9, 0.1, 0., 0.], [0.3, 0.7, 0., 0.], [1., 0., 0., 0.], [1., 0., 0., 0.]])

=== Generated Samples Details [Trainer.eval_loop()] ===
training complete
""" + 5 * DRAW + "Size of c: torch.Size([2, 1024])\n" * 800  # fmt: skip


def examined(folder: Path, model: str = MODEL, program: str = PROGRAM, config: str = CONFIG) -> Examination:
    source = folder / "source"
    source.mkdir()
    (source / "network.py").write_text(model)
    (source / "program.py").write_text(program)
    (source / "broken.py").write_text("def f(:\n")
    (folder / "config.yaml").write_text(config)
    (folder / "log_001.txt").write_text(LOG)
    return examine(read_log(folder / "log_001.txt"), read_settings(folder / "config.yaml"), read_source(source))
