"""Frames of a recorded game, each with the frames and the actions that led to it."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from rqvae.errors import BadInput
from rqvae.img_datasets.interfaces import ActionCondition, DataSpec, LabeledImageData, LabeledImageDataset, Split
from rqvae.randomness import fold

SCHEMA = 1
"""Version of the recording's layout that this reader knows (`meta.json`, key `schema`)."""

COLUMNS = {"action": np.int16, "episode": np.int32}
"""The columns of a shard besides `frames` that are read."""


class GameFrames(LabeledImageDataset):
    """Frames of a recording (`python -m rqvae collect`), with the last `history` actions, and frames, before each.

    The splits are of whole episodes, 5 % for test, 5 % for val (at least one each), the rest for train, ranked by a
    hash of (seed of the recording, episode). Different episodes may show identical frames; so of val every frame that
    also occurs in train is left out, and of test every frame that occurs in either.

    Args:
        split: train, val or test.
        root: folder of the recording.
        size: side of the frames in pixels; must be that of the recording.
        history: K, how many actions before a frame are given.
        num_actions: how many actions the game has; must be that of the recording.
        context: give the K frames before each as well, one window of K + 1 frames a sample.
        padding: also give the first frames of an episode, whose history is missing in part; what is missing is masked,
            and shows the episode's first frame.
        action_names: the actions in the order in which the model is to number them; null is the recording's order.
        rollout_steps: n, consecutive frames that a world model is trained to predict, each after its own prediction of
            those before (`rqvae.models.stage2.world_model.WorldModel`): windows then have K + n frames.
        vae: folder of a latent cache of this recording (`python -m rqvae cache-latents`), from which Stage2 takes the
            latents of targets and context in training, in place of `data.latents`; one of another Stage1 is refused.

    Raises:
        BadInput: `history` or `num_actions` below 1, names that are not `num_actions` different ones, or several
            rollout steps on padded windows or without `context`.
    """

    def __init__(
        self,
        split: Split,
        *,
        root: str,
        size: int,
        history: int = 1,
        num_actions: int = 5,
        context: bool = False,
        padding: bool = True,
        action_names: list[str] | None = None,
        rollout_steps: Literal[1, 2, 4] = 1,
        vae: str | None = None,
    ) -> None:
        if history < 1 or num_actions < 1:
            raise BadInput(f"history, num_actions: expected at least 1, got {history}, {num_actions}")
        if action_names is not None and len(set(action_names)) != num_actions:
            raise BadInput(f"action_names: expected {num_actions} different names, got {action_names}")
        if rollout_steps > 1 and (padding or not context):
            raise BadInput(
                f"rollout_steps: expected 1 unless context: true and padding: false (every step has a true frame to "
                f"predict), got {rollout_steps}"
            )
        self.split, self.root, self.size, self.rollout_steps = split, Path(root), size, rollout_steps
        self.history, self.num_actions, self.vae = history, num_actions, vae
        self.context, self.padding, self.action_names = context, padding, tuple(action_names or ())
        self._sha256 = ""
        self._frames: npt.NDArray[np.uint8] = np.empty((0, size, size, 3), dtype=np.uint8)
        self._action: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._first: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._episode: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._kept: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._fresh: npt.NDArray[np.bool_] = np.empty(0, dtype=np.bool_)

    @property
    def spec(self) -> DataSpec:
        """(3, size, size), the number of actions, the history."""
        shape = (3, self.size, self.size)
        actions: dict[str, Any] = {"num_actions": self.num_actions, "names": self.action_names}
        window: dict[str, Any] = {"context": self.context, "rollout_steps": self.rollout_steps}
        return DataSpec(shape, history=self.history, **window, **actions)

    @property
    def _slots(self) -> int:
        """How many frames come before the last target."""
        return self.history + self.rollout_steps - 1

    def open(self) -> None:
        """Read the recording into memory: the frames of this split's episodes, as uint8.

        Raises:
            BadInput: no recording in `root`, one of another size or number of actions, a shard that is missing or not
                the one that was recorded, an action or an episode out of range, a history as long as the longest
                episode, or a split without frames.
        """
        meta = self._read_meta()
        shards = meta["shards"]
        self._sha256 = hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest()
        rank = rank_split(meta["seed"], meta["episodes"])
        frames, actions, episodes, hashes = [], [], [], []
        for shard in shards:
            table = _read_shard(self.root / shard["file"], shard, self.size)
            hashes.append(_hash_frames(table["frames"]))
            episodes.append(table["episode"])
            where = f"{self.root / shard['file']}"
            _check_range(table["episode"], meta["episodes"], f"{where}: episode")
            _check_range(table["action"], self.num_actions, f"{where}: action")
            mine = np.array([rank[k] == self.split for k in table["episode"]])
            frames.append(table["frames"][mine])
            actions.append(table["action"][mine])
        episode = np.concatenate(episodes)
        longest = int(np.bincount(episode).max())
        if self._slots >= longest:
            raise BadInput(f"history: expected less than {longest}, longest episode of {self.root}, got {self._slots}")
        split_of = np.array([rank[k] for k in range(meta["episodes"])])[episode]
        self._frames = np.concatenate(frames)
        self._action = self._number_of(meta["action_names"])[np.concatenate(actions)]
        self._episode = episode[split_of == self.split]
        _, starts, lengths = np.unique(self._episode, return_index=True, return_counts=True)
        self._first = np.repeat(starts, lengths)
        self._keep(np.concatenate(hashes), split_of, meta["episodes"])

    def _number_of(self, recorded: list[str]) -> npt.NDArray[np.int64]:
        """The model's number of each of the recording's actions, by name."""
        self.action_names = self.action_names or tuple(recorded)
        if set(self.action_names) != set(recorded):
            raise BadInput(
                f"{self.root}: action_names: expected those of the recording, {recorded}, got {list(self.action_names)}"
            )
        return np.array([self.action_names.index(name) for name in recorded], dtype=np.int64)

    def _keep(self, hashes: npt.NDArray[np.uint64], split_of: npt.NDArray[np.str_], episodes: int) -> None:
        """Find the frames of the split that occur in no split before it."""
        seen = {"train": [], "val": ["train"], "test": ["train", "val"]}[self.split]
        mine = hashes[split_of == self.split]
        self._fresh = fresh = ~np.isin(mine, hashes[np.isin(split_of, seen)])
        whole = self.padding | (np.arange(len(mine)) - self._slots >= self._first)
        self._kept = np.flatnonzero(fresh & whole)
        if not len(self._kept):
            remedy = (
                "record more frames" if episodes > 2 else f"record 3 episodes, one for each split, there is {episodes}"
            )
            raise BadInput(
                f"{self.root}: expected frames for the split {self.split} that no earlier split has, got none of "
                f"{len(mine)} in {len(hashes)} recorded; {remedy}"
            )

    def _read_meta(self) -> dict[str, Any]:
        path = self.root / "meta.json"
        if not path.is_file():
            size = f"--frames 20000 --size {self.size}"
            raise BadInput(
                f"{path}: expected a complete recording, got no such file; "
                f"run: python -m rqvae collect maze-chase {size} --out {self.root}"
            )
        try:
            meta = json.loads(path.read_bytes())
            found = {"schema": meta["schema"], "size": meta["size"], "num_actions": len(meta["action_names"])}
            meta["seed"], meta["episodes"], [(s["file"], s["bytes"], s["sha256"], s["frames"]) for s in meta["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path}: expected the description of a recording, got {error!r}") from error
        for key, value in (("schema", SCHEMA), ("size", self.size), ("num_actions", self.num_actions)):
            if found[key] != value:
                raise BadInput(f"{path}: {key}: expected {value}, got a recording with {found[key]}")
        return meta

    def fingerprint(self) -> str:
        """Of the shards' own hashes, the split and the windows."""
        windows = ":context" * self.context + ":whole" * (not self.padding)
        windows += f":rollout{self.rollout_steps}" * (self.rollout_steps > 1)
        return f"GameFrames:{self.split}:{self.history}{windows}:{self._sha256}"

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> LabeledImageData:
        """`img` uint8 (3, size, size); `condition` with `actions` (K,), the last of which led to this frame.

        `condition.context` uint8 (K, 3, size, size) is there where `context` asks for it; with n rollout steps both
        have K + n - 1 slots.
        """
        sample, (at, before) = self.without_image(index), self.image_indices(index)
        condition = sample.condition
        assert isinstance(condition, ActionCondition)
        if self.context:
            context = torch.from_numpy(self._frames[before]).permute(0, 3, 1, 2)
            condition = replace(condition, context=context.contiguous())
        img = torch.from_numpy(self._frames[at]).permute(2, 0, 1).contiguous()
        return LabeledImageData(img=img, condition=condition)

    def without_image(self, index: int) -> LabeledImageData:
        """The sample's actions, without any frame."""
        at = int(self._kept[index])
        steps = np.arange(at - self._slots, at)
        inside = steps >= self._first[at]
        actions = np.where(inside, self._action[np.maximum(steps, 0)], self.num_actions)
        known: dict[str, Any] = {"actions": torch.from_numpy(actions), "mask": torch.from_numpy(inside)}
        return LabeledImageData(condition=ActionCondition(context=None, num_actions=self.num_actions, **known))

    def encoded_images(self) -> LabeledImageDataset:
        """Every frame of the split, whatever the windows: windows of any history and padding share one cache."""
        return _Frames(self.split, self._frames, self.spec.image_shape, self._sha256)

    def image_indices(self, index: int) -> tuple[int, list[int]]:
        """The target, and the frames of its context, where missing ones are the episode's first; see the base class."""
        at = int(self._kept[index])
        before = np.maximum(np.arange(at - self._slots, at), self._first[at])
        return at, before.tolist() if self.context else []

    def as_window(self, index: int) -> dict[str, Any]:
        """A sample under the names and in the shapes of earlier world-model code.

        Returns:
            `obs` (3K, H, W) and `img` (3, H, W) float in [0, 1], `y` (1, K, A) one-hot actions, zero where the history
            is missing, `y_mask` (1, K) with 0 there, and `data_info` with the episode and whether it ends here.
        """
        sample, at = self[index], int(self._kept[index])
        condition = sample.condition
        assert isinstance(condition, ActionCondition)
        first = self._first[at]
        obs = torch.from_numpy(self._frames[np.maximum(np.arange(at - self.history, at), first)]).permute(0, 3, 1, 2)
        actions, mask = condition.actions[-self.history :], condition.mask[-self.history :]
        one_hot = torch.nn.functional.one_hot(actions, self.num_actions + 1)[:, : self.num_actions]
        return {
            "obs": obs.flatten(0, 1).float() / 255,
            "img": sample.require_img().float() / 255,
            "y": one_hot[None].float(),
            "y_mask": mask[None].to(torch.int16),
            "data_info": {
                "episode": int(self._episode[at]),
                "done": at + 1 == len(self._first) or int(self._first[at + 1]) != int(first),
            },
        }

    def episode(self, k: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Frames (N, H, W, 3) and the actions (N,) taken at them, of the k-th episode of this split."""
        mine = self._episode == np.unique(self._episode)[k]
        return self._frames[mine], self._action[mine]

    def fresh(self, k: int) -> npt.NDArray[np.bool_]:
        """(N,) which frames of the k-th episode no split before this one shows."""
        return self._fresh[self._episode == np.unique(self._episode)[k]]

    def mean_frame(self) -> npt.NDArray[np.uint8]:
        """(H, W, 3) uint8, of all frames of this split."""
        return np.round(self._frames.mean(0, dtype=np.float64)).astype(np.uint8)

    @property
    def episodes(self) -> int:
        """How many episodes this split has."""
        return len(np.unique(self._episode))


class _Frames(LabeledImageDataset):
    """The frames of an opened split, one a sample, without actions."""

    def __init__(self, split: Split, frames: npt.NDArray[np.uint8], shape: tuple[int, int, int], sha256: str) -> None:
        self.split, self._shape, self._frames, self._sha256 = split, shape, frames, sha256

    @property
    def spec(self) -> DataSpec:
        return DataSpec(self._shape)

    def fingerprint(self) -> str:
        return f"GameFrames:{self.split}:frames:{self._sha256}"

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: int) -> LabeledImageData:
        return LabeledImageData(img=torch.from_numpy(self._frames[index]).permute(2, 0, 1).contiguous())


def rank_split(seed: int, episodes: int) -> dict[int, Split]:
    """The split of each episode of a recording.

    By rank of the hash and not by a threshold: of 40 episodes a threshold leaves val empty in one recording of eight.

    Args:
        seed: of the recording.
        episodes: how many it has.
    """
    order = sorted(range(episodes), key=lambda k: fold(seed, "split", k))
    part = max(1, round(0.05 * episodes))
    return {k: "test" if i < part else "val" if i < 2 * part else "train" for i, k in enumerate(order)}


def _check_range(numbers: npt.NDArray[Any], count: int, what: str) -> None:
    """BadInput unless all are in [0, count)."""
    wrong = numbers[(numbers < 0) | (numbers >= count)]
    if len(wrong):
        raise BadInput(f"{what}: expected 0 to {count - 1}, got {wrong[0]}")


def _hash_frames(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """(N, H, W, 3) -> (N,) 64 bits: among a million frames two different ones share a hash once in 37 million tries."""
    digests = b"".join(hashlib.blake2b(frame.tobytes(), digest_size=8).digest() for frame in frames)
    return np.frombuffer(digests, dtype=np.uint64)


def _read_shard(path: Path, entry: dict[str, Any], size: int) -> dict[str, npt.NDArray[Any]]:
    """The columns of a shard, after its bytes are known to be those that were recorded."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: expected a shard of the recording, got {error.strerror}") from error
    if len(content) != entry["bytes"]:
        raise BadInput(f"{path}: expected {entry['bytes']} bytes, got {len(content)}; record again")
    if (sha256 := hashlib.sha256(content).hexdigest()) != entry["sha256"]:
        raise BadInput(f"{path}: expected sha256 {entry['sha256'][:12]}..., got {sha256[:12]}...; record again")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as table:
            columns = {name: np.asarray(table[name]) for name in ("frames", *COLUMNS)}
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: expected the columns frames, action, episode, got {error!r}") from error
    expected: dict[str, Any] = {"frames": (np.dtype(np.uint8), (entry["frames"], size, size, 3))}
    expected |= {name: (np.dtype(dtype), (entry["frames"],)) for name, dtype in COLUMNS.items()}
    for name, column in columns.items():
        if (column.dtype, column.shape) != expected[name]:
            raise BadInput(f"{path}: {name}: expected {expected[name]}, got {(column.dtype, column.shape)}")
    return columns
