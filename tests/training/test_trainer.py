"""The training loop: it learns, stops and resumes, and its files are complete."""

import errno
import json
import math
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import SMALL, weights_in
from ddpm_cli import DDPM
from ddpm_cli.config import DataConfig, RunConfig, ScheduleConfig, TrainConfig
from ddpm_cli.data.pack import open_pack
from ddpm_cli.data.sources import open_source
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.loss import training_loss
from ddpm_cli.diffusion.schedule import NoiseSchedule
from ddpm_cli.distributed import World
from ddpm_cli.errors import TrainingError
from ddpm_cli.models import runs
from ddpm_cli.nn.ema import EMA, _lerp_together
from ddpm_cli.training import checkpoint, trainer
from ddpm_cli.training.events import Finished, Logged, NotSaved, Previewed, Previewing, Progress, Saved
from ddpm_cli.training.memory import needed_memory
from ddpm_cli.training.metrics import Done, Window
from ddpm_cli.training.plan import plan_run
from ddpm_cli.training.previews import Previews
from ddpm_cli.training.trainer import Trainer
from processes import GUARD

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def pack(digits, tmp_path_factory):
    config = DataConfig(images=str(digits), size=8, channels=1)
    cache = tmp_path_factory.mktemp("cache")
    return open_pack(open_source(digits, cache), config, cache)


def config_of(steps=6, **train) -> RunConfig:
    settings = {"batch_size": 4, "lr": 1e-3, "lr_warmup": 4, "save_every": 3, "sample_every": 3, "log_every": 2}
    return RunConfig(
        version="test",
        preset="tiny",
        data=DataConfig(images="", size=8, channels=1),
        train=TrainConfig(steps=steps, **(settings | train)),
        unet=replace(SMALL, dropout=0.1),  # so that its random numbers are tested too
        schedule=ScheduleConfig(num_train_timesteps=4),
    )


def start(run, pack, config, dtype=torch.float32, compiled=False) -> Trainer:
    run.mkdir(exist_ok=True)
    return Trainer(run, config, pack, CPU, dtype, compiled=compiled)


def test_the_loss_is_equation_14():
    x_0, eps = torch.rand(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    t = torch.tensor([0, 10, 500, 999])
    seen = {}

    def unet(x_t, t):
        seen["x_t"] = x_t
        return torch.zeros_like(x_t)

    denoiser = Denoiser.from_config(unet, ScheduleConfig())
    assert training_loss(denoiser, x_0, t, eps).mean().item() == pytest.approx((eps**2).mean().item(), rel=1e-6)
    torch.testing.assert_close(seen["x_t"], denoiser.schedule.q_sample(x_0, t, eps))
    perfect = Denoiser.from_config(lambda x_t, t: eps, ScheduleConfig())
    assert training_loss(perfect, x_0, t, eps).mean().item() == 0


@pytest.mark.parametrize(
    ("decay", "expected"),
    [(0.0, [2, 4, 4, 4, 4, 4, 4, 4]), (0.5, [2, 4, 4, 4, 4, 3, 2, 1]), (1.0, [2, 3.5, 3, 2.5, 2, 1.5, 1, 0.5])],
)
def test_the_learning_rate_rises_and_falls(decay, expected):
    settings = config_of(steps=8, lr=4.0, lr_warmup=2, lr_decay=decay).train
    assert [settings.lr_at(step) for step in range(8)] == expected


def test_ema_warms_up_to_its_decay():
    average, weights = [torch.zeros(2)], [torch.ones(2)]
    ema = EMA(average, decay=0.9)
    expected = 0.0
    for n in range(100):
        ema.update(weights, torch.tensor(True))
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay)
        assert average[0][0].item() == pytest.approx(expected, rel=1e-5)
    assert ema.decay_at(0) == pytest.approx(0.1)
    assert ema.decay_at(10**6) == 0.9


def test_ema_of_all_tensors_together():
    """As on CUDA devices: the same average up to rounding, and exactly the same if a step was skipped."""
    shapes = [(4, 3, 3, 3), (4,), (2, 8)]
    weights, average = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    for share in (0.0, 1e-4, 0.3, 0.9):
        expected = [tensor.lerp(weight, share) for tensor, weight in zip(average, weights, strict=True)]
        found = [tensor.clone() for tensor in average]
        _lerp_together(found, weights, torch.tensor(share))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert share or all(map(torch.equal, found, average))


def test_it_learns(tmp_path, pack):
    """The loss falls well below that of predicting nothing, and samples are nearer to the data than noise is."""
    config = config_of(steps=180, batch_size=16, lr=1e-2, save_every=180, sample_every=180, log_every=60)
    training = start(tmp_path / "run", pack, config)
    losses = [event.loss for event in training.events() if isinstance(event, Progress)]
    assert losses[-1] < 0.7
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [60, 120, 180]
    assert lines[2]["loss"] < lines[0]["loss"]
    colours = {name: lines[2].pop(name) for name in ("mean", "raw_mean", "data_mean")}  # the preview was at the end
    assert all(math.isfinite(value) and value > 0 for line in lines for value in line.values())
    assert colours["data_mean"] == [round(value, 2) for value in pack.mean]
    drawn = Image.open(tmp_path / "run" / "samples" / "step-00000180.png").reduce(12)  # 8 pixels are drawn as 96
    tiles = [drawn.crop((x, y, x + 8, y + 8)) for x in range(2, 40, 10) for y in range(2, 40, 10)]
    mean = sum(value for tile in tiles for value in tile.tobytes()) / 16 / 64
    assert colours["mean"] == [pytest.approx(mean, abs=0.01)]


def test_the_time_that_is_left_has_the_previews(tmp_path, pack):
    training = start(tmp_path / "run", pack, config_of(steps=7))
    training.previews = Previews(3, share=0.75)
    found = [event for event in training.events() if isinstance(event, Progress)]
    for event in found:
        steps_per_second = event.images_per_second / training.config.train.batch_size
        assert event.seconds_left == pytest.approx(4 * (7 - event.step) / steps_per_second)
    assert found[-1].seconds_left == 0


def test_events_and_files(tmp_path, pack):
    run = tmp_path / "run"
    events = list(start(run, pack, config_of(steps=7, keep=2)).events())
    kinds = [type(event) for event in events if not isinstance(event, Progress)]
    assert [kind for kind in kinds if kind is not Saved] == [
        *[Logged, Previewing, Previewed, Logged, Previewing, Previewed, Logged],
        *[Previewing, Previewed, Logged, Finished],
    ]
    assert [event.step for event in events if isinstance(event, Saved)] == [3, 6, 7]
    assert events[-1] == Finished(7, interrupted=False)
    assert [path.name for path in runs.checkpoints(run)] == ["step-00000006", "step-00000007"]
    assert sorted(path.name for path in (run / "samples").iterdir()) == [
        f"step-{step:08d}{kind}.png" for step in (3, 6, 7) for kind in ("-raw", "")
    ]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "metrics.jsonl", "samples"]
    model = DDPM.from_pretrained(run)
    assert model.sample(2).shape == (2, 1, 8, 8)
    raw = DDPM.from_pretrained(run, weights="raw")
    assert not torch.equal(raw.unet.conv_in.weight, model.unet.conv_in.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_resumed_twice_equals_an_uninterrupted_run(tmp_path, pack, dtype):
    """Weights, averages and moments are equal to the last bit, and the metrics have each step once."""
    for _ in start(tmp_path / "whole", pack, config_of(steps=10), dtype).events():
        pass
    run = tmp_path / "parts"
    for stop_at in (3, 8, 10):
        training = start(run, pack, config_of(steps=10), dtype)
        if found := runs.checkpoints(run):
            training.resume(found[-1])
        *_, last = training.events(lambda training=training, stop_at=stop_at: training.step >= stop_at)
        assert last == Finished(stop_at, interrupted=stop_at < 10)
    assert weights_in(run) == weights_in(tmp_path / "whole")

    def metrics(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["lr"]) for line in lines]

    assert metrics(run) == metrics(tmp_path / "whole")


@pytest.mark.long
def test_a_compiled_run_resumes_exactly(tmp_path, pack):
    """It learns as a run that is not compiled does, but for rounding and dropout."""

    def run(name, *stops, compiled=True):
        folder = tmp_path / name
        for steps in stops:
            trainer = start(folder, pack, config_of(6, log_every=3), compiled=compiled)
            if found := runs.checkpoints(folder):
                trainer.resume(found[-1])
            list(trainer.events(lambda trainer=trainer, steps=steps: trainer.step >= steps))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return weights_in(folder), [json.loads(line)["loss"] for line in lines]

    whole = run("whole", 6)
    assert run("parts", 3, 6) == whole
    assert whole[1] == pytest.approx(run("plain", 6, compiled=False)[1], rel=0.02)


def test_a_run_is_compiled_once(tmp_path, pack):
    """Previews and the estimate of memory have other modes and batches, for which it would be compiled anew."""
    graphs = []
    trainer = start(tmp_path / "run", pack, config_of(3), compiled=True)
    trainer.unet.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward, dynamic=False)
    needed_memory(trainer, 4)
    list(trainer.events())
    assert runs.previews(trainer.run)
    assert len(graphs) == 1


def test_metrics_after_the_checkpoint_are_removed(tmp_path, pack):
    """A killed run has lines of steps after its last checkpoint, which are done again."""
    run = tmp_path / "run"
    for _ in start(run, pack, config_of(steps=4, save_every=3)).events():
        pass
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 9}\n{"step": 8, "lo')  # the last one was cut off
    training = start(run, pack, config_of(steps=8))
    training.resume(runs.checkpoints(run)[-1])
    for _ in training.events():
        pass
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [2, 4, 6, 8]


def test_previews_after_the_checkpoint_are_removed(tmp_path, pack):
    """A checkpoint has the newest preview up to its step. Files that are not previews stay."""
    run = tmp_path / "run"
    for _ in start(run, pack, config_of(steps=7, keep=9)).events():
        pass
    [_, *lost] = runs.checkpoints(run)
    for folder in lost:
        folder.rename(folder.with_name(f"lost-{folder.name}"))
    (run / "samples" / "step-6-mine.png").touch()
    training = start(run, pack, config_of(steps=4, sample_every=3))
    training.resume(runs.checkpoints(run)[-1])
    drawn = []
    for event in training.events():
        if isinstance(event, Progress) and event.step == 4:
            drawn = sorted(path.name for path in (run / "samples").iterdir())
    assert drawn == ["step-00000003-raw.png", "step-00000003.png", "step-6-mine.png"]


def test_a_checkpoint_has_no_preview_of_a_later_step(tmp_path, pack):
    """Such as one that could not be removed."""
    training = start(tmp_path / "run", pack, config_of(steps=1))
    later = runs.preview_file(training.run, 6)
    later.parent.mkdir()
    later.write_bytes(b"a later preview")
    for step, expected in ((5, None), (6, b"a later preview")):
        assert checkpoint._newest_preview(training.run, step) == expected


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, pack):
    run = tmp_path / "run"
    training = start(run, pack, config_of(steps=8))
    events = training.events()
    for event in events:
        if isinstance(event, Logged) and event.step == 4:  # after the preview of step 3, which waits for its checkpoint
            break
    good = weights_in(run)
    training.parameters[0].data.fill_(math.nan)
    with pytest.raises(TrainingError, match="the loss is not finite at step 5") as caught:
        list(events)
    advice = "Try --precision fp32, or a new run with a smaller --lr."
    assert caught.value.hint == f"{advice} {runs.checkpoints(run)[-1]} is safe: --resume continues from it."
    assert weights_in(run) == good


def test_a_line_that_was_not_written_is_not_logged(tmp_path, pack):
    """As on a full disk. The event has the reason in words."""
    training = start(tmp_path / "run", pack, config_of(steps=4))
    metrics = training.run / "metrics.jsonl"
    events = []
    for event in training.events():
        events.append(event)
        if isinstance(event, Logged):
            metrics.unlink()
            metrics.mkdir()
    assert [event.step for event in events if isinstance(event, Logged)] == [2]
    assert NotSaved(4, f"{metrics}: Is a directory") in events


def test_a_gradient_that_is_not_finite_is_named_with_its_step(tmp_path, pack, monkeypatch):
    """The error names the first bad step, even if the loss was not read for many steps."""
    monkeypatch.setattr(trainer, "_EVENT_SECONDS", math.inf)
    training = start(tmp_path / "run", pack, config_of(steps=9, log_every=9, save_every=9))
    training.parameters[-1].register_hook(lambda gradient: gradient * (math.inf if training.step == 4 else 1))
    with pytest.raises(TrainingError, match="the gradient is not finite at step 5"):
        list(training.events())
    assert runs.checkpoints(training.run) == []  # a run that skipped a step must not be saved


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path, pack):
    """The weights, their averages and Adam's moments stay."""
    training = start(tmp_path / "run", pack, config_of())

    def state() -> list[torch.Tensor]:
        networks = (*training.unet.state_dict().values(), *training.averaged.state_dict().values())
        return [value.clone() for value in (*networks, *training._moments().values())]

    for _ in range(3):
        training.train_step()
    before = state()
    hook = training.parameters[-1].register_hook(lambda gradient: gradient * math.nan)
    assert not training.train_step().grad_norm.isfinite()
    hook.remove()
    assert all(map(torch.equal, before, state()))
    training.train_step()
    assert not all(map(torch.equal, before, state()))


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_a_batch_in_parts_is_the_same_batch(tmp_path, pack, parts):
    whole, split = (
        start(tmp_path / name, pack, replace(config_of(accumulate=n), unet=SMALL))
        for name, n in (("whole", 1), ("split", parts))
    )
    for _ in range(3):
        one, other = whole.train_step(), split.train_step()
        torch.testing.assert_close(one.losses, other.losses, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.grad_norm, other.grad_norm, rtol=1e-4, atol=1e-6)


def test_losses_by_quarter_of_t(tmp_path, pack):
    """Each image counts in the quarter of its t, and in the loss."""
    training = start(tmp_path / "run", pack, config_of())
    window = Window(training.config, training.run, CPU, World(), 0, 0.0)
    t = torch.tensor([0, 0, 1, 3])  # T is 4
    window.add(Done(torch.tensor([1.0, 3.0, 5.0, 7.0]), t, torch.tensor(1.0)), 1)
    line = window.line(1, 1.0, 1e-3)
    assert [line[f"loss_q{i}"] for i in (1, 2, 3, 4)] == [2.0, 5.0, None, 7.0]
    assert line["loss"] == 4.0


@pytest.mark.parametrize(
    ("spoiled", "message"), [(4, "the loss is not finite at step 5"), (6, "not finite at step [67]")]
)
def test_a_run_with_nan_is_not_saved_at_its_end(tmp_path, pack, monkeypatch, spoiled, message):
    """Ctrl-C right after the loss became NaN, before it was read; and NaN weights after a step with a finite loss."""
    monkeypatch.setattr(trainer, "_EVENT_SECONDS", math.inf)
    training = start(tmp_path / "run", pack, config_of(steps=99, log_every=50, save_every=3, sample_every=99))

    def spoil() -> bool:
        if training.step == spoiled:
            training.parameters[0].data.fill_(math.nan)
        return training.step > spoiled

    with pytest.raises(TrainingError, match=message) as caught:
        list(training.events(spoil))
    assert "step-00000003 is safe" in (caught.value.hint or "")
    [kept] = runs.checkpoints(training.run)
    saved = checkpoint.load_training(kept)
    assert saved.step == 3
    assert all(value.isfinite().all() for value in (*saved.raw.values(), *saved.ema.values()))


def test_a_checkpoint_is_due_by_the_clock_too(tmp_path, pack, monkeypatch):
    monkeypatch.setattr("ddpm_cli.training.checkpointer.SAVE_SECONDS", 0.0)
    run = tmp_path / "run"
    config = config_of(steps=3, save_every=100, sample_every=100, keep=9)
    for _ in start(run, pack, config).events():
        pass
    assert runs.checkpoints(run)[0].name == "step-00000001"


def test_training_continues_while_a_checkpoint_is_written(tmp_path, pack, monkeypatch):
    """Later steps are not in the checkpoint, since it is a copy."""
    training = start(tmp_path / "run", pack, config_of(steps=9, save_every=5, sample_every=9, log_every=9))
    later = threading.Event()
    write = checkpoint.save_file

    def patient(*args, **keywords):
        assert later.wait(GUARD), "training waits for the disk"
        write(*args, **keywords)

    monkeypatch.setattr(checkpoint, "save_file", patient)
    at_step_5 = []

    def watch() -> bool:
        if training.step == 5 and not at_step_5:
            at_step_5.extend(parameter.clone() for parameter in training.parameters)
        if training.step == 8:
            later.set()
        return False

    saved = [event for event in training.events(watch) if isinstance(event, Saved)]
    assert [event.step for event in saved] == [5, 9]
    names = [name for name, _ in training.unet.named_parameters()]
    raw = checkpoint.load_training(saved[0].path).raw
    assert all(torch.equal(raw[name], value) for name, value in zip(names, at_step_5, strict=True))
    assert not torch.equal(raw["conv_in.weight"], training.unet.conv_in.weight)


def test_a_checkpoint_is_finished_after_its_run_fails(tmp_path, pack, monkeypatch):
    """The run fails while it is written; its weights are finite."""
    training = start(tmp_path / "run", pack, config_of(steps=99, save_every=5, sample_every=99, log_every=1))
    write, check = checkpoint.save_file, training._is_sound
    failed = threading.Event()

    def slow(*args, **keywords):
        assert failed.wait(GUARD)
        write(*args, **keywords)

    def check_at_last(window: Window) -> bool:
        failed.set()
        return check(window)

    def spoil() -> bool:
        if training.step == 6:
            training.parameters[0].data.fill_(math.nan)
        return False

    monkeypatch.setattr(checkpoint, "save_file", slow)
    monkeypatch.setattr(training, "_is_sound", check_at_last)
    with pytest.raises(TrainingError, match="the loss is not finite at step 7") as caught:
        list(training.events(spoil))
    [kept] = runs.checkpoints(training.run)
    assert checkpoint.load_training(kept).step == 5
    assert "step-00000005 is safe" in (caught.value.hint or "")


def test_a_stop_during_a_preview_ends_the_run(tmp_path, pack):
    """No further step is done, and the checkpoint is of that step."""
    training = start(tmp_path / "run", pack, config_of(steps=9, save_every=9, sample_every=4, log_every=9))
    drawing = []
    for event in training.events(lambda: bool(drawing)):
        if isinstance(event, Previewing):
            drawing.append(event.step)
    assert event == Finished(4, interrupted=True)


def test_folders_that_cannot_be_flushed(tmp_path, pack, monkeypatch):
    """As on some network file systems: checkpoints are written anyway."""
    flush = os.fsync

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    events = list(start(tmp_path / "run", pack, config_of(keep=1)).events())
    assert events[-1] == Finished(6, interrupted=False)
    assert len(runs.checkpoints(tmp_path / "run")) == 1


def test_flips_are_optional(tmp_path, pack):
    """With flips about half of the images of a step are mirrored, without flips none."""

    def x_t_of(flip):
        config = config_of(batch_size=64)
        training = start(tmp_path / "run", pack, replace(config, data=replace(config.data, flip=flip)))
        training.schedule = NoiseSchedule(torch.tensor([1e-9], dtype=torch.float64))  # x_t is x_0
        seen = {}
        forward = training.unet.forward
        training.unet.forward = lambda x_t, t: seen.setdefault("x_t", x_t) * 0 + forward(x_t, t)
        training.train_step()
        return seen["x_t"]

    plain, flipped = x_t_of(False), x_t_of(True)
    same = torch.isclose(plain, flipped, atol=1e-3).all((1, 2, 3))
    mirrored = torch.isclose(plain.flip(3), flipped, atol=1e-3).all((1, 2, 3))
    assert (same | mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_plan(digits, emoji):
    from ddpm_cli.data.survey import Survey, survey
    from ddpm_cli.errors import UsageError

    found = survey(open_source(digits, Path()))
    config = plan_run(found, str(digits), on_gpu=False, train={"steps": 1000})
    assert (config.preset, config.data.size, config.data.channels, config.train.steps) == ("tiny", 28, 1, 1000)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert plan_run(found, str(digits), on_gpu=True).preset == "cifar10"
    assert plan_run(found, str(digits), on_gpu=True).data.size == 32  # 28 does not divide by 8

    def chosen(side, square=False, on_gpu=True, **options):
        config = plan_run(Survey(9, 9, 0, side, side if square else None), str(digits), on_gpu, **options)
        return config.preset, config.data.size

    assert chosen(20) == ("cifar10", 32)
    assert chosen(100) == ("64", 64)
    assert chosen(96, square=True) == ("64", 64)
    assert chosen(178) == ("128", 128)
    assert chosen(1000) == ("256", 256)
    assert chosen(1000, on_gpu=False) == ("tiny", 32)
    assert chosen(1000, preset="cifar10") == ("cifar10", 32)
    assert chosen(1000, on_gpu=False, data={"size": 64}) == ("tiny", 64)
    assert chosen(1000, data={"size": 96}) == ("128", 96)
    with pytest.raises(UsageError, match="--size 30"):
        chosen(100, data={"size": 30})
    with pytest.raises(UsageError, match="--preset huge"):
        chosen(100, preset="huge")
    paper = plan_run(Survey(9, 9, 0, 32, 32), str(digits), True, preset="cifar10")
    assert (paper.train.steps, paper.train.batch_size, paper.train.lr) == (800_000, 128, 2e-4)
    assert (paper.train.lr_warmup, paper.train.ema_decay, paper.train.grad_clip) == (5000, 0.9999, 1.0)
    assert (paper.unet.dropout, paper.schedule.variance_type) == (0.1, "fixed_large")
    assert paper.unet.down_block_types.index("AttnDownBlock2D") == 1  # at 16x16
    big = plan_run(Survey(9, 9, 0, 256, 256), str(digits), True, preset="256")
    assert (big.train.lr, big.train.batch_size, big.unet.dropout) == (2e-5, 64, 0.0)
    assert big.unet.down_block_types.index("AttnDownBlock2D") == 4
