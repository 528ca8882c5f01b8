"""A decoder on text: resumed bit for bit, the same on one process and on two, the paper's size."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
import yaml
from safetensors.torch import load_file

import iha
from iha_lab import baselines
from iha_lab.experiments import configs, parse, read
from iha_lab.experiments.lm import LanguageModellingRun, bits_per_byte
from lab.tests.data.test_corpus import write

STEPS = 6
TINY: dict[str, Any] = {
    "experiment": "lm",
    "attentions": [{"kind": "iha", "pseudo_heads": 2, "schedule": True}],
    "seeds": [0],
    "tokenizer": 280,
    "held_out_bytes": 3000,
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 64,
    "seq_len": 32,
    "steps": STEPS,
    "batch_size": 4,
    "save_every": 2,
    "learning_rate": 0.01,
    "warmup_steps": 2,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("source")))


def tiny(source: str, **changes: Any) -> LanguageModellingRun:
    run = parse(TINY | {"corpus": source} | changes).only_run()
    assert isinstance(run, LanguageModellingRun)
    return run


def quiet(done: int, total: int, note: str) -> None: ...


def logged(folder: Path) -> list[dict[str, float]]:
    """What the last checkpoint knows of all steps, unrounded."""
    state = folder / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json"
    rows: list[dict[str, float]] = json.loads(state.read_text())["log_history"]
    return rows


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in logged(folder) if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"checkpoint-{STEPS}" / "model.safetensors")


def launch(command: list[str], **environment: str) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_run_measures_the_held_out_text(source: str, tmp_path: Path) -> None:
    """The loss again, without the Trainer: every token of whole batches, from those before it."""
    told: list[str] = []
    run = tiny(source, tensorboard=True)
    folder = tmp_path / "runs" / "one"
    result = run.run(folder, lambda done, total, note: told.append(f"{done}/{total} {note}"))
    model = run.model()
    state = weights(folder)
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    (corpus,) = (tmp_path / "runs" / "corpus").glob("*/corpus.json")
    text = json.loads(corpus.read_text())
    tokens = torch.frombuffer(
        bytearray(corpus.with_name("held_out.bin").read_bytes()), dtype=torch.int32
    ).long()
    sequences = (len(tokens) - 1) // 32 // 4 * 4
    total = 0.0
    for i in range(sequences):
        piece = tokens[32 * i : 32 * i + 33]
        with torch.no_grad():
            chances = model(piece[None, :-1]).logits[0].log_softmax(-1)
        total -= float(chances[torch.arange(32), piece[1:]].sum())
    loss = result.measures["validation loss"]
    assert loss == pytest.approx(total / (sequences * 32), rel=1e-5)
    assert loss < math.log(280) - 0.5  # it has learned something
    assert result.measures["bits per byte"] == pytest.approx(
        loss / math.log(2) * len(tokens) / text["held_out"]["bytes"]
    )
    assert [x for x, _ in result.curves["validation loss over steps"]] == [2, 4, 6]
    assert [x for x, _ in result.curves["training loss over steps"]] == [1, 2, 3, 4, 5, 6]
    assert result.notes["text sha256"] == text["sha256"]
    assert result.notes["tokens seen"] == STEPS * 4 * 32
    assert result.cost["extra_parameters"] == 2 * 4 * 4**2 * 2  # 4H²P in each of two layers
    assert told[-1].startswith(f"{STEPS}/{STEPS} loss")
    assert list((folder / "tensorboard").glob("events.*"))


def test_bits_per_byte_of_a_coin() -> None:
    """A text of 8 tokens, a coin's toss each, that is 2 bytes long."""
    assert bits_per_byte(math.log(2), 8, 2) == pytest.approx(4)


@pytest.mark.parametrize(
    "attention",
    [
        {"kind": "mha"},
        {"kind": "local-global", "window": 8},
        {"kind": "talking-heads"},
        {"kind": "differential"},
        {"kind": "knocking-heads"},
        {"kind": "2-simplicial", "windows": [8, 4]},
        {"kind": "iha", "pseudo_heads": 2, "rope": "token", "collapse": "per-head"},
    ],
    ids=lambda attention: attention["kind"],
)
def test_every_baseline_learns(attention: dict[str, Any], source: str, tmp_path: Path) -> None:
    run = tiny(source, attentions=[attention], num_layers=1)
    curve = run.run(tmp_path / "run", quiet).curves["validation loss over steps"]
    assert curve[-1][1] < curve[0][1]


def test_all_attentions_of_a_seed_start_alike(source: str) -> None:
    one = tiny(source, attentions=[{"kind": "mha"}]).model().state_dict()
    other = tiny(source).model().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert set(other) - set(one)


def test_a_killed_run_goes_on_bit_for_bit(source: str, tmp_path: Path) -> None:
    run = tiny(source)
    run.run(tmp_path / "whole", quiet)
    run.config().write(tmp_path / "config.yaml")
    script = """
        import os, signal, sys
        from pathlib import Path
        from iha_lab.experiments import read
        def kill(done, total, note):
            if done == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        read(Path(sys.argv[1])).only_run().run(Path(sys.argv[2]), kill)
    """
    arguments = [str(tmp_path / "config.yaml"), str(tmp_path / "killed")]
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments], stderr=subprocess.PIPE
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    found = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert found == {"checkpoint-2", "checkpoint-4"}

    run.run(tmp_path / "killed", quiet)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == STEPS
    expected = weights(tmp_path / "whole")
    for name, tensor in weights(tmp_path / "killed").items():
        assert torch.equal(tensor, expected[name]), name


def test_parts_of_a_batch_add_up(source: str, tmp_path: Path) -> None:
    tiny(source).run(tmp_path / "whole", quiet)
    tiny(source, micro_batch_size=1).run(tmp_path / "parts", quiet)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_two_processes_learn_what_one_does(source: str, tmp_path: Path) -> None:
    """torchrun, through the engine's own command: half of each batch in each process."""
    run = tiny(source)
    (one, two) = (tmp_path / name for name in ("one", "two"))
    run.run(one, quiet)
    two.mkdir()
    run.config().write(two / "config.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "iha_lab.experiments", str(two)]
    lines = launch(command).splitlines()
    told = [json.loads(line) for line in lines if line.startswith("{")]
    assert [line["done"] for line in told] == [*range(1, STEPS + 1)]  # by one process only
    record = json.loads((two / "record.json").read_text())
    assert record["result"]["notes"]["processes"] == 2
    for mine, theirs in zip(logged(two), logged(one), strict=True):
        for name in mine.keys() & {"loss", "eval_loss", "grad_norm", "learning_rate"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    expected = weights(one)
    for name, tensor in weights(two).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)


# Accelerate has FSDP for accelerators only: its state never becomes FSDP where the processes talk
# through gloo. What it does for a GPU there, this does for a CPU; all else is as installed.
SHARDED = """
    import json, shutil, sys
    from pathlib import Path
    import torch
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    from torch.distributed.tensor import DTensor
    from transformers import TrainerCallback

    start = AcceleratorState.__init__
    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState.__init__ = with_fsdp

    from iha_lab.machine import rank
    from iha_lab.train import trainer
    from iha_lab.experiments import read
    from iha_lab.experiments.runner import run_one

    folder, again = Path(sys.argv[1]), Path(sys.argv[2])
    shards, gathered, interrupted = {}, {}, False

    class Look(trainer.Watch):
        def on_step_end(self, args, state, control, **kwargs):
            if interrupted and state.global_step == 5:
                self.asked = rank() == 1  # the other process hears nothing
            super().on_step_end(args, state, control, **kwargs)

        def on_train_end(self, args, state, control, model, **kwargs):
            for name, parameter in model.named_parameters():
                assert isinstance(parameter, DTensor), name
                shards[name] = list(parameter.to_local().shape)
                gathered[name] = parameter.full_tensor().detach().clone()

    trainer.Watch = Look
    run_one(read(folder / "config.yaml").only_run(), folder)
    first = dict(gathered)
    if rank() == 0:
        torch.save(first, folder / "weights.pt")
        (folder / "shards.json").write_text(json.dumps(shards))
        shutil.copytree(folder / "checkpoints", again / "checkpoints")
        shutil.rmtree(again / "checkpoints" / "checkpoint-6")
    torch.distributed.barrier()
    interrupted = True
    try:
        run_one(read(folder / "config.yaml").only_run(), again)
    except KeyboardInterrupt:
        assert (again / "checkpoints" / "checkpoint-5" / "trainer_state.json").exists()
    else:
        raise AssertionError("it was not interrupted")
    interrupted = False
    run_one(read(folder / "config.yaml").only_run(), again)
    for name, tensor in gathered.items():
        assert torch.equal(tensor, first[name]), name
"""


@pytest.fixture
def fsdp(tmp_path: Path) -> Path:
    """Accelerate's own configuration, as `accelerate config` writes it."""
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 2,
        "use_cpu": True,
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        },
    }
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "fsdp.yaml"


def test_sharded_weights_learn_what_whole_ones_do(source: str, fsdp: Path, tmp_path: Path) -> None:
    """FSDP in two processes: losses and weights, mixing tensors too, are those of one process.

    Then the same from its middle, where Ctrl-C reaches one process only and both stop and go on.
    """
    run = tiny(source)
    (one, two, again) = (tmp_path / name for name in ("one", "two", "again"))
    run.run(one, quiet)
    two.mkdir()
    run.config().write(two / "config.yaml")
    worker = tmp_path / "worker.py"
    worker.write_text(textwrap.dedent(SHARDED))
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(fsdp)]
    launch([*accelerate, "--main_process_port", "0", str(worker), str(two), str(again)])
    for mine, theirs in zip(logged(two), logged(one), strict=True):
        for name in mine.keys() & {"loss", "eval_loss", "grad_norm", "learning_rate"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert losses(again) == losses(two)
    shards = json.loads((two / "shards.json").read_text())
    mixing = [name for name in shards if "head_mixing" in name]
    assert len(mixing) == 2 * 4
    assert all(shards[name] == [2, 4, 2] for name in mixing)  # half of (H, H, P)
    expected = weights(one)
    start = run.model().state_dict()
    for name, tensor in torch.load(two / "weights.pt").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4, msg=name)
        assert not torch.equal(tensor, start[name]), name


def test_fsdp_that_would_be_left_out_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="asks for FSDP, which it has for accelerators only"):
        tiny(source).run(tmp_path / "run", quiet)


@pytest.mark.parametrize("attention", [*TINY["attentions"], {"kind": "local-global", "window": 8}])
def test_bf16_computes_in_bf16_and_keeps_weights_in_float32(
    attention: dict[str, Any], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(source, attentions=[attention]).run(tmp_path / "float32", quiet)
    seen: set[torch.dtype] = set()
    plain = LanguageModellingRun.model

    def watched(self: LanguageModellingRun, **options: Any) -> Any:
        model = plain(self, **options)
        for module in (model.model.layers[0].self_attn, model.model.layers[1].mlp):
            module.register_forward_hook(
                lambda module, args, out: seen.add(
                    (out[0] if isinstance(out, tuple) else out).dtype
                )
            )
        return model

    monkeypatch.setattr(LanguageModellingRun, "model", watched)
    tiny(source, attentions=[attention], bf16=True).run(tmp_path / "bf16", quiet)
    assert seen == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.float32}
    pair = losses(tmp_path / "bf16"), losses(tmp_path / "float32")
    assert pair[0] != pair[1]
    assert pair[0] == pytest.approx(pair[1], rel=0.02)


def test_checkpointed_gradients_are_the_same(source: str, tmp_path: Path) -> None:
    tiny(source).run(tmp_path / "kept", quiet)
    tiny(source, gradient_checkpointing=True).run(tmp_path / "again", quiet)
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": 100}, "at least 257"),
        ({"hidden_size": 30}, "hidden_size must be a multiple of num_heads, got 30, 4"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads, got 3, 4"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_bad_configs(changes: dict[str, Any], message: str, source: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        tiny(source, **changes)


def test_a_model_smaller_than_its_tokenizer_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size must be at least 280, .* got 270"):
        tiny(source, vocab_size=270).run(tmp_path / "run", quiet)


def test_a_batch_that_processes_cannot_share_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="batch_size must be a multiple of micro_batch_size = 3"):
        tiny(source, micro_batch_size=3).run(tmp_path / "run", quiet)


def test_the_small_config_has_a_sensible_window() -> None:
    runs: Any = read(configs("lm")["small"]).runs()
    (run,) = [run for run in runs if run.name == "iha-p4-schedule--seed-0"]
    layers = run.model(meta=True).model.layers[:4]
    assert {layer.self_attn.iha.window for layer in layers} == {8}


def test_the_papers_model_has_its_size_and_its_flops() -> None:
    experiment: Any = read(configs("lm")["paper"])
    assert experiment.steps * experiment.batch_size * experiment.seq_len == pytest.approx(
        240e9, rel=0.05
    )
    models = {run.attention.label: run.model(meta=True) for run in experiment.runs()}
    plain, mixed = models["mha"], models["iha-p20-schedule"]
    assert {parameter.device.type for parameter in mixed.parameters()} == {"meta"}

    # What two MLP matrices of the paper's 10,240 give, embeddings counted once: its "2.4B".
    N, H, d, P, W, layers = 8192, 20, 128, 20, 10, 26
    width = H * d
    paper = layers * (4 * width**2 + 2 * width * 10_240) + 128_256 * width
    assert paper == pytest.approx(2.4e9, rel=0.02)
    assert plain.num_parameters() == pytest.approx(paper, rel=0.01)
    assert mixed.num_parameters() - plain.num_parameters() == 21 * 4 * H**2 * P

    cost = {name: baselines.cost(model, N) for name, model in models.items()}
    attention = {"mha": layers * 2 * H * d * N**2}
    window = 4 * H * d * (N * P) * (W * P)
    mixing = 2 * N * d * P * 4 * H**2
    attention["iha-p20-schedule"] = 21 * (window + mixing) + 5 * 2 * H * d * N**2
    for name, flops in attention.items():
        assert cost[name].attention_flops == flops
    # The windows match the paper's count, which leaves the mixing out; that is a fifth of a layer.
    schedule = iha.hybrid_schedule(layers, N, P)
    assert schedule.flops(H, d) == attention["iha-p20-schedule"]
    matched = (21 * window + 5 * 2 * H * d * N**2) / attention["mha"]
    assert matched == pytest.approx(1, rel=0.02)
    assert attention["iha-p20-schedule"] / attention["mha"] == pytest.approx(1.14, abs=0.005)
    assert cost["iha-p20-schedule"].total_flops / cost["mha"].total_flops == pytest.approx(
        1.026, abs=0.002
    )
