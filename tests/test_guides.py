"""The guide for backbone authors: its blocks are the file and run outside of the package; its findings are real."""

from __future__ import annotations

import re

import pytest

from diffusion_tokred import methods, testing
from diffusion_tokred.backbones import BACKBONES, auraflow, backbone_of
from diffusion_tokred.testing import families, tiny
from tests.guides import Guide

GUIDE = Guide("your-backbone.md", "backbones/auraflow.py")
WORKING = sum("auraflow" in method.backbones for method in methods())


@pytest.fixture
def unknown():
    """AuraFlow is not known yet, and is in its old place afterwards: tables have the registry's order."""
    before = dict(BACKBONES)
    del BACKBONES["auraflow"]
    yield
    BACKBONES.clear()
    BACKBONES.update(before)


def test_the_guide_is_the_file():
    GUIDE.assert_is_the_file(most=100)


def test_the_guide_runs(capsys, monkeypatch, unknown):
    space = GUIDE.follow(monkeypatch)
    assert type(backbone_of(families.auraflow().transformer)).__module__ == "mine"
    out = capsys.readouterr().out
    assert "BROKEN" not in out and out.count("ok     acts") == WORKING
    for line in re.findall(r"^ok +.*", GUIDE.text, re.M):
        assert line.removesuffix(" ...") in out
    space["test_contract"]("neutral")
    space["test_flops"]("tome")
    space["test_start"]()


@pytest.mark.parametrize(
    "site, attribute",
    [(auraflow.AuraFlowJointAttention, "text_first"), (auraflow.AuraFlowStreamFeedForward, "joint")],
)
def test_broken_backbones_are_found_as_shown(site, attribute, monkeypatch):
    monkeypatch.setattr(site, attribute, False)
    found = testing.check_backbone(families.auraflow, tiny.run, configs=[], checks=["grid", "offers"])
    printed = [_without_numbers(str(finding)) for finding in found if not finding.ok]
    assert len(printed) == 1
    assert printed[0] in [_without_numbers(line) for line in re.findall(r"^BROKEN.*", GUIDE.text, re.M)]


def test_a_wrong_start_is_found(monkeypatch):
    """With the sentence that the guide shows."""

    class Early(auraflow.AuraFlow):
        def observe(self, layout, denoiser, inputs):
            super().observe(layout, denoiser, inputs)
            layout.levels[0].start -= 8

    monkeypatch.setitem(BACKBONES, "auraflow", Early())
    (found,) = testing.check_backbone(families.auraflow, tiny.run, configs=[], checks=["grid"])
    assert not found.ok and str(found) in GUIDE.text


def _without_numbers(text: str) -> str:
    """Rounding differs between machines."""
    return re.sub(r"difference \S+ at \(.*?\)", "difference", text)
