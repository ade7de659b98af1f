"""Forecasts, budgets and GPU-hours: against the closed form and by hand."""

import json
from dataclasses import replace

import pytest
from phalanx.recipes import devices
from phalanx_server.scaling.outlook import pace_of
from phalanx_server.scaling.picture import svg
from phalanx_server.scaling.study import Question, document, study

ASKED = Question(resamples=50)
H100_HOUR = 989.4e12 * 3600


def test_a_recommendation_is_the_closed_form_and_its_forecast_is_its_loss(runs, hoffmann):
    found = study(runs(), [], replace(ASKED, budget_flops=1e22)).recommendation
    parameters, tokens = map(float, hoffmann.best_split(1e22))
    assert found.parameters.value == pytest.approx(parameters, rel=1e-3)
    assert found.tokens.value == pytest.approx(tokens, rel=1e-3)
    assert found.loss.value == pytest.approx(float(hoffmann.best_loss(1e22)), rel=1e-4)


def test_intervals_hold_the_truth_and_the_value(runs, hoffmann):
    some = runs(noise=0.005, seed=3)
    found = study(some, [], replace(ASKED, budget_flops=1e22, planned=(2e10, 4e11)))
    truth = dict(zip(("parameters", "tokens"), map(float, hoffmann.best_split(1e22)), strict=True))
    truth["loss"] = float(hoffmann.best_loss(1e22))
    for name, true in truth.items():
        one = getattr(found.recommendation, name)
        assert one.low < true < one.high and one.low < one.value < one.high, name
    assert found.forecast.loss.low < hoffmann.loss(2e10, 4e11) < found.forecast.loss.high


def test_gpu_hours_by_peak_and_mfu(runs):
    asked = replace(ASKED, planned=(1e9, 2e10), gpu="h100", mfu=0.5)
    assert study(runs(), [], asked).forecast.gpu_hours == pytest.approx(1.2e20 / (0.5 * H100_HOUR))
    fp8 = study(runs(), [], replace(asked, precision="fp8")).forecast
    assert fp8.gpu_hours == pytest.approx(1.2e20 / (0.5 * 2 * H100_HOUR), rel=1e-3)
    assumed = study(runs(), [], replace(asked, mfu=None))
    assert "40 % MFU (assumed)" in assumed.pace.said
    assert study(runs(), [], replace(asked, gpu=None, mfu=None)).forecast.gpu_hours is None


def test_gpu_hours_by_what_the_runs_achieved(runs):
    some = [replace(run, tokens_per_s=3e14 * 8 / (6 * run.parameters), gpus=8, gpu_type="h100-80gb") for run in runs()]
    assert pace_of(some, gpu=None, mfu=None, precision="bf16").flops_per_s == pytest.approx(3e14)
    assert pace_of(some, gpu="h100", mfu=None, precision="bf16").said == "measured by 25 runs on h100-80gb"
    assert pace_of(some, gpu="h100", mfu=0.4, precision="bf16").flops_per_s == pytest.approx(0.4 * 989.4e12)
    assert "assumed" in pace_of(some, gpu="a100", mfu=None, precision="bf16").said
    budget = study(some, [], replace(ASKED, budget_gpu_hours=10)).recommendation
    assert budget.flops == pytest.approx(10 * 3600 * 3e14) and budget.gpu_hours == pytest.approx(10)


def test_runs_whose_compute_was_given_change_what_a_budget_buys(runs):
    some = [replace(run, flops=7 * run.parameters * run.tokens) for run in runs()]
    found = study(some, [], replace(ASKED, budget_flops=1e22))
    best = found.recommendation
    assert found.k == pytest.approx(7) and 7 * best.parameters.value * best.tokens.value == pytest.approx(1e22)


def test_gpu_hours_without_a_pace_and_unknown_gpus_are_refused(runs):
    with pytest.raises(ValueError, match="give --gpu h100"):
        study(runs(), [], replace(ASKED, budget_gpu_hours=10))
    with pytest.raises(ValueError, match="did you mean h100"):
        study(runs(), [], replace(ASKED, gpu="h1000"))


def test_the_document_is_json_and_the_picture_has_every_run(runs):
    asked = replace(ASKED, budget_flops=1e22, planned=(2e10, 4e11), gpu="h200")
    found = study(runs(noise=0.003, sizes=10), [], asked)
    said = json.loads(json.dumps(document(found), allow_nan=False))
    assert said["law"]["alpha"]["low"] < said["law"]["alpha"]["value"] < said["law"]["alpha"]["high"]
    assert len(said["runs"]) == 50 and said["recommendation"]["gpu_hours"] > 0
    drawn = svg(found)
    assert drawn.count("<circle") == 50 + 8 and drawn.count("<polyline") == 8 + 1 and drawn.count("<polygon") == 9
    assert "planned" in drawn and "recommended" in drawn and "nan" not in drawn


# ------------------------------------------------------------------ the table of GPUs


@pytest.mark.parametrize("device", devices.DEVICES.values(), ids=devices.DEVICES)
def test_every_gpu_has_sensible_figures_and_a_source(device):
    assert devices.find(device.name) is device and device.source.startswith("https://")
    assert device.fp16_flops > device.fp32_flops > 1e12 and device.memory_bytes >= 16 << 30
    assert device.bf16_flops in (None, device.fp16_flops)
    assert device.fp8_flops is None or device.fp8_flops == pytest.approx(2 * device.fp16_flops, rel=0.02)


def test_gpus_are_found_by_what_people_and_drivers_call_them():
    named = {"H100": "h100-80gb", "a100_40gb": "a100-40gb", "h100 pcie": "h100-pcie-80gb", "V100": "v100-32gb"}
    assert {word: devices.find(word).name for word in named} == named
    products = {
        "NVIDIA H100 80GB HBM3": "h100-80gb",
        "NVIDIA H100 PCIe": "h100-pcie-80gb",
        "NVIDIA H200": "h200",
        "NVIDIA B200": "b200",
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA A100-SXM4-80GB": "a100-80gb",
        "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4",
        "Tesla V100-SXM2-16GB": "v100-16gb",
        "Tesla T4": "t4",
        "AMD Instinct MI300X": "mi300x",
    }
    assert {product: getattr(devices.of_product(product), "name", None) for product in products} == products
    for other in ("NVIDIA GeForce GT 710", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A10G"):
        assert devices.of_product(other) is None, other


def test_a_precision_that_a_gpu_has_not_is_an_error_that_names_those_it_has():
    with pytest.raises(ValueError, match=r"v100-32gb has no bf16: use one of fp16, fp32"):
        devices.find("v100").peak_flops("bf16")
    with pytest.raises(ValueError, match="unknown precision 'int4'"):
        devices.find("h100").peak_flops("int4")
