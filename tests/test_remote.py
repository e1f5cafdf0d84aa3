"""Runs at URLs: a local S3 server and fsspec's memory, half-written folders, lost copies; and mounts that refuse."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import yaml

from rqvae import remote
from rqvae.callbacks.interfaces import Observer
from rqvae.errors import BadInput, RunFailed
from rqvae.trainers import checkpoint, heartbeat, mirror
from rqvae.trainers.fetching import fetched
from tests.conftest import (
    assert_same,
    finish,
    free_ports,
    largest_difference,
    only,
    rows,
    start,
    tensors,
    without_times,
)

QUIET = ["--pictures.every", "null", "--online_eval.every", "null", "--data.workers", 0]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server in this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket's URL; copies are in tmp_path, and a heartbeat's claim is settled at once."""
    import s3fs

    keys = {"AWS_ACCESS_KEY_ID": "of", "AWS_SECRET_ACCESS_KEY": "nobody", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": server, "RQVAE_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(heartbeat.RemoteHeartbeat.__init__, "__defaults__", (10.0, 60.0, 0.05))
    name = f"b{time.monotonic_ns()}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


def line(save_dir: object, *more: object, config: str = "stage2") -> list[object]:
    words = ["train", f"configs/debug/{config}.yaml", "--save-dir", save_dir, "--project", "p", "--run-name", "r"]
    return [*words, *QUIET, *more]


def objects(url: str) -> dict[str, int]:
    return remote.Store(url).sizes()


def run_at(url: str) -> str:
    (name,) = remote.Store(f"{url}/p").folders()
    return f"{url}/p/{name}"


def lose_copies(tmp_path: Path) -> None:
    """What a fresh machine has: nothing."""
    shutil.rmtree(tmp_path / "cache")


def test_a_run_at_a_url_is_that_of_a_folder_and_goes_on_from_nothing_but_the_url(
    bucket: str, tmp_path: Path, cli, capfd
) -> None:
    """Interrupted, its copy lost, repeated: bit for bit what an undisturbed run in a folder gives."""
    cut = ["--observers", json.dumps([{"class_path": f"{__name__}.StopAt", "init_args": {"step": 7}}])]
    every = ["--train.steps", 12, "--checkpoint.every", 5, "--checkpoint.keep_last", 2]
    assert cli(*line(bucket, *every, *cut)) == 143
    found = objects(run_at(bucket))
    assert {"config.yaml", "environment.json", "metrics.jsonl", "log.txt"} < found.keys()
    assert {name.split("/")[1] for name in found if "COMPLETE" in name} == {"step_00000005", "step_00000007"}
    assert not [name for name in found if name.startswith(".")], "no heartbeat is left behind"
    lose_copies(tmp_path)
    assert cli(*line(bucket, *every, *cut)) == 0
    assert "from step_00000007" in capfd.readouterr().err
    assert cli(*line(tmp_path / "folder", *every)) == 0
    whole, copy = only(tmp_path / "folder" / "p"), remote.folder_of(run_at(bucket))
    lose_copies(tmp_path)
    assert fetched(run_at(bucket)) == copy
    assert_same(tensors(whole, 12), tensors(copy, 12))
    assert without_times(whole) == without_times(copy)
    steps = {name.split("/")[1] for name in objects(run_at(bucket)) if name.startswith("checkpoints/")}
    assert steps == {"step_00000010", "step_00000012"}, "those that need not stay are removed there too"
    before = objects(run_at(bucket))
    assert cli(*line(bucket, *every, *cut)) == 0
    assert "is finished" in capfd.readouterr().err
    assert objects(run_at(bucket)) == before


class StopAt(Observer):
    """SIGTERM to this process after a step, once: a run that began later is left alone."""

    def __init__(self, step: int) -> None:
        self.step, self.begun = step, 0

    def on_fit_start(self, run: Any) -> None:
        self.begun = run.clock.step

    def after_step(self, run: Any, losses: Any) -> None:
        if run.clock.step == self.step and self.begun < self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def trained(bucket: str, cli) -> str:
    """The URL of a run with checkpoints 2 and 4, which goes on to 6 when `more_of` is repeated."""
    assert cli(*more_of(bucket, StopAt, step=4)) == 143
    return run_at(bucket)


def more_of(save_dir: object, observer: type[Observer], **arguments: Any) -> list[object]:
    given = {"class_path": f"{__name__}.{observer.__name__}", "init_args": arguments}
    every = ["--train.steps", 6, "--checkpoint.every", 2, "--checkpoint.keep_last", 4, "--train.log_every", 1]
    return line(save_dir, *every, "--observers", json.dumps([given]))


def half_written(run: str) -> str:
    remote.Store(run).remove(["checkpoints/step_00000004/COMPLETE"])
    return "it has no COMPLETE"


def cut_off(run: str) -> str:
    remote.Store(run).write("checkpoints/step_00000004/model/stage2.safetensors", b"half")
    return "has another size than COMPLETE says"


def damaged(run: str) -> str:
    name = "checkpoints/step_00000004/model/stage2.safetensors"
    content = remote.Store(run).read(name)
    assert content is not None
    remote.Store(run).write(name, content[:-1] + bytes([content[-1] ^ 1]))
    return "is not what COMPLETE says"


def no_list(run: str) -> str:
    remote.Store(run).write("checkpoints/step_00000004/COMPLETE", b"[1")
    return "COMPLETE cannot be read"


@pytest.mark.parametrize("harm", [half_written, cut_off, damaged, no_list])
def test_complete_decides(harm: Callable[[str], str], trained: str, bucket: str, tmp_path: Path, cli, capfd) -> None:
    """Of a checkpoint that is not whole the fault is named, the one before it is used, and it is made good."""
    whole = {name: remote.Store(trained).read(name) for name in objects(trained) if "step_00000004/model" in name}
    fault = harm(trained)
    lose_copies(tmp_path)
    assert cli(*more_of(bucket, StopAt, step=4)) == 143
    errors = capfd.readouterr().err
    assert "from step_00000002" in errors
    assert "step_00000004: " in errors
    assert fault in errors
    lose_copies(tmp_path)
    assert checkpoint.find(fetched(trained)).name == "step_00000004"
    assert {name: remote.Store(trained).read(name) for name in whole} == whole


def test_another_machine_trains_there(trained: str, bucket: str, tmp_path: Path, cli, capfd, monkeypatch) -> None:
    remote.Store(trained).write(".heartbeat", b"0123 elsewhere")
    assert cli(*more_of(bucket, StopAt, step=4)) == 2
    errors = capfd.readouterr().err
    assert f"error: {trained}: another run is training in this folder" in errors
    assert "after 60 s it counts as dead" in errors
    monkeypatch.setattr(heartbeat.RemoteHeartbeat.__init__, "__defaults__", (10.0, 0.0, 0.05))
    assert cli(*more_of(bucket, StopAt, step=4)) == 0


class DieAt(Observer):
    """SIGKILL to this process, when step 4 is at the URL."""

    def after_step(self, run: Any, losses: Any) -> None:
        if run.clock.step == 5 and not (run.folder / "died").exists():
            run.state._sender.wait()
            (run.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_and_repeated_on_the_same_machine_waits_for_nobody(bucket: str, tmp_path: Path, cli, capfd) -> None:
    code, errors = finish(start(*more_of(bucket, DieAt)))
    assert code == -signal.SIGKILL, errors
    assert ".heartbeat" in objects(run_at(bucket))
    assert cli(*more_of(bucket, DieAt)) == 0
    assert "from step_00000004" in capfd.readouterr().err
    run = remote.folder_of(run_at(bucket))
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    assert not (run / ".unsent").exists()


def test_what_could_not_be_sent_is_an_error_and_is_sent_by_the_same_command(
    bucket: str, tmp_path: Path, cli, capfd, monkeypatch
) -> None:
    send = remote.Store.send

    def refuses(store: remote.Store, file: Path, name: str) -> None:
        if "step_00000004" in name:
            raise RunFailed(f"{store.url}/{name}: cannot be written: no more today")
        send(store, file, name)

    monkeypatch.setattr(remote.Store, "send", refuses)
    assert cli(*more_of(bucket, StopAt, step=99)) == 3
    said = [row for row in capfd.readouterr().err.splitlines() if row.startswith("error:")]
    assert len(said) == 1
    assert "cannot be written: no more today" in said[0]
    there = objects(run_at(bucket))
    assert "checkpoints/step_00000002/COMPLETE" in there
    assert "checkpoints/step_00000004/COMPLETE" not in there
    monkeypatch.setattr(remote.Store, "send", send)
    assert cli(*more_of(bucket, StopAt, step=99)) == 0
    there = objects(run_at(bucket))
    assert {name for name in there if "COMPLETE" in name} == {
        f"checkpoints/step_0000000{n}/COMPLETE" for n in (2, 4, 6)
    }
    assert "FINISHED" in there


def test_a_signal_waits_for_what_is_being_sent(bucket: str, cli, monkeypatch) -> None:
    send, sent = remote.Store.send, []

    def slow(store: remote.Store, file: Path, name: str) -> None:
        time.sleep(0.3)
        send(store, file, name)
        sent.append(name)

    monkeypatch.setattr(remote.Store, "send", slow)
    assert cli(*more_of(bucket, StopAt, step=3)) == 143
    assert [name for name in sent if "step_00000003" in name]
    assert "checkpoints/step_00000003/COMPLETE" in objects(run_at(bucket))


def test_every_door_takes_urls(trained: str, bucket: str, tmp_path: Path, cli, capfd) -> None:
    """What reads a run reads its URL, on a machine that has never seen it."""
    import rqvae

    here = rqvae.load(remote.folder_of(trained)).sample(2, seed=1)
    lose_copies(tmp_path)
    assert rqvae.load(trained).sample(2, seed=1).equal(here)
    older = rqvae.load(f"{trained}/checkpoints/step_00000002")
    assert older.description is not None
    assert older.description.source["step"] == 2
    lose_copies(tmp_path)
    assert cli("sample", trained, "--num", 2, "--out", tmp_path / "images.npz", "--seed", 1) == 0
    assert cli("report", trained, "--out", tmp_path / "report.html") == 0
    assert cli("health", trained, "--fail-on", "critical") in (0, 1)
    assert cli("consolidate", trained, tmp_path / "whole") == 0
    assert cli("export", trained, tmp_path / "exported") == 0
    more = ["--resume-ckpt", f"{trained}/checkpoints/step_00000002", "--train.steps", 6, "--train.log_every", 1]
    more += ["--checkpoint.every", 2, "--checkpoint.keep_last", 4]
    lose_copies(tmp_path)
    assert cli(*line(tmp_path / "new", *more)) == 0
    assert "step_00000002" in capfd.readouterr().err
    run = rqvae.Run.load(trained).fit()
    assert remote.url_of(run) == trained
    assert_same(tensors(only(tmp_path / "new" / "p"), 6), tensors(run, 6))


def test_stage1_and_reconstructions_at_a_url(bucket: str, tmp_path: Path, cli) -> None:
    assert cli(*line(bucket, "--train.steps", 2, config="stage1")) == 0
    stage1 = run_at(bucket)
    lose_copies(tmp_path)
    words = ["recon", "configs/debug/stage1.yaml", "--save-dir", f"{bucket}/out", "--run-name", "r", "--ckpt", stage1]
    assert cli(*words) == 0
    there = objects(f"{bucket}/out/r")
    assert {"metrics.json", "images/000000.png", "grids/reconstructions.png"} <= there.keys()
    lose_copies(tmp_path)
    assert cli(*words, "--resume-ckpt", f"{stage1}/") == 0
    assert objects(f"{bucket}/out/r").keys() == there.keys()
    lose_copies(tmp_path)
    config = yaml.safe_load(Path("configs/debug/stage1.yaml").read_text())
    stage2 = ["--stage1", json.dumps(config["stage1"]), "--connector", "null", "--stage1_checkpoint", stage1]
    assert cli(*line(bucket, "--train.steps", 1, *stage2, "--run-name", "g")) == 0


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("s3://no-such-bucket-here/x", "SAVE_DIR s3://no-such-bucket-here/x/p: expected a place that can be written"),
        ("gs://bucket/x", "pip install 'mae-dit[remote]'"),
        ("what://bucket/x", "expected a URL that fsspec knows"),
        ("file:///tmp/x", "expected a folder's path"),
        ("s3://bucket/../x", "without . or .."),
        ("simplecache::s3://bucket/x", "expected a folder"),
    ],
)
def test_a_place_that_is_none(place: str, words: str, bucket: str, tmp_path: Path, cli, capfd, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parent.parent / "configs" / "debug" / "stage2.yaml"
    assert cli("train", config, "--save-dir", place, "--project", "p", *QUIET) == 2
    errors = [row for row in capfd.readouterr().err.splitlines() if "error" in row]
    assert len(errors) == 1
    assert words in errors[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing is made"


def test_a_run_that_is_not_there(bucket: str) -> None:
    with pytest.raises(BadInput, match="found nothing there"):
        fetched(f"{bucket}/p/r_20260102-030405")
    with pytest.raises(BadInput, match="found none"):
        fetched(f"{bucket}/p/r_20260102-030405/checkpoints/step_00000001")


def test_a_store_of_another_kind(tmp_path: Path, monkeypatch) -> None:
    """The same on fsspec's memory: nothing here knows of S3."""
    monkeypatch.setenv("RQVAE_CACHE", str(tmp_path))
    url = "memory://shelf/run"
    folder = remote.folder_of(url)
    assert remote.url_of(folder / "checkpoints") == f"{url}/checkpoints"
    assert remote.url_of(tmp_path) is None
    checkpoint.save(folder / "checkpoints" / "step_00000003", {"model/x": {"w": torch.arange(3.0)}}, {"step": 3})
    (folder / "config.yaml").write_text("a: 1")
    (folder / ".lock").touch()
    order: list[str] = []
    put = remote.Store.write
    monkeypatch.setattr(remote.Store, "write", lambda store, name, text: (order.append(name), put(store, name, text)))
    mirror.Mirror(folder).send()
    assert order == ["config.yaml", "checkpoints/step_00000003/COMPLETE"], (
        "what COMPLETE vouches for is there before it"
    )
    store = remote.Store(url)
    names = ["COMPLETE", "meta.json", "model/x.safetensors"]
    assert sorted(store.sizes()) == [*(f"checkpoints/step_00000003/{name}" for name in names), "config.yaml"]
    store.write("../outside", b"1")
    shutil.rmtree(tmp_path / "remote")
    assert checkpoint.read(checkpoint.find(fetched(url)), "model/x")["w"].tolist() == [0, 1, 2]
    lock = heartbeat.RemoteHeartbeat(url, settle=0)
    lock.acquire()
    (remote.copies() / ".machine").write_text("another")
    with pytest.raises(BadInput, match="another run is training"):
        heartbeat.RemoteHeartbeat(url, settle=0).acquire()
    lock.release()
    assert store.read(".heartbeat") is None


def job(arguments: list[object], folder: Path) -> list[tuple[int, str]]:
    """Two hosts with a rank each, which share no folder: each has copies of its own."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    hosts = [
        start(*arguments, env={**os.environ, **common, "RANK": str(n), "RQVAE_CACHE": str(folder / f"host{n}")})
        for n in (0, 1)
    ]
    try:
        return [finish(host) for host in hosts]
    finally:
        for host in hosts:
            host.kill()


@pytest.mark.parametrize("parallel", ["sharded", pytest.param("data", marks=pytest.mark.slow)])
def test_two_hosts_that_share_nothing_but_the_url(parallel: str, bucket: str, tmp_path: Path, cli) -> None:
    """Begun elsewhere, and ended by two hosts that have never seen it: the weights of one process and a folder."""
    exact = ["--train.precision", "fp64"]
    assert cli(*more_of(bucket, StopAt, step=3), *exact) == 143
    run = run_at(bucket)
    lose_copies(tmp_path)
    ended = job([*more_of(bucket, StopAt, step=3), *exact, "--train.parallel", parallel], tmp_path)
    assert [code for code, _ in ended] == [0, 0], ended
    assert "from step_00000003" in ended[0][1]
    if parallel == "sharded":
        hosts = [tmp_path / f"host{n}" / "remote" / "s3" / run.removeprefix("s3://") for n in (0, 1)]
        parts = [sorted((host / "checkpoints" / "step_00000006" / "shards").glob("*.distcp")) for host in hosts]
        assert [[part.name for part in own] for own in parts] == [["__0_0.distcp"], ["__1_0.distcp"]]
        older = [path.name for path in (hosts[1] / "checkpoints").iterdir()]
        assert "step_00000004" not in older, "host 1 does not keep parts of what is older"
    assert cli(*more_of(tmp_path / "one", StopAt, step=99), *exact) == 0
    assert largest_difference(whole(fetched(run), 6), whole(only(tmp_path / "one" / "p"), 6)) < 1e-9
    assert [row["step"] for row in rows(fetched(run))] == [1, 2, 3, 4, 5, 6]


def whole(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step_{step:08d}"
    checkpoint.verify(folder)
    return {f"{group}:{k}": v for group in checkpoint.groups(folder) for k, v in checkpoint.read(folder, group).items()}


def test_a_mounted_bucket_that_refuses_what_object_stores_have_not(tmp_path: Path, cli) -> None:
    """SAVE_DIR on a mount without mmap, hard links, renaming of folders and locks: interrupted and repeated."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("a C compiler makes the mount")
    library = tmp_path / "refuses.so"
    source = Path(__file__).parent / "mount" / "refuses.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    mount = tmp_path / "mount"
    mount.mkdir()
    environment = {**os.environ, "LD_PRELOAD": str(library), "REFUSES": str(mount)}
    words = more_of(mount, StopAt, step=4)
    assert finish(start(*words, env=environment))[0] == 143
    code, errors = finish(start(*words, env=environment))
    assert code == 0, errors
    assert "from step_00000004" in errors
    refused = (tmp_path / "mount.calls").read_text().splitlines()
    assert {"mmap", "flock"} == {*refused}, "nothing else was even tried"
    assert cli(*more_of(tmp_path / "plain", StopAt, step=99)) == 0
    assert_same(tensors(only(mount / "p"), 6), tensors(only(tmp_path / "plain" / "p"), 6))
