"""Which networks predictions are held against, and what is said of them."""

from __future__ import annotations

from typing import Any

from latency_tables import BLOCK, table_of

from experiments.budget_results import Row
from experiments.predictions import Input, Network, Results, chosen_widths, random_widths, table, untimed
from experiments.results import made_here
from models.promise import Device

CHANNELS = {"first": 64, "second": 128, "third": 256}


def row(way: str, width: int) -> Row:
    return Row(
        data="glyphs",
        seed=0,
        share=0.5,
        way=way,
        widths={"first": width},
        predicted_ms=width,
        parameters=1,
        macs=1,
        validation_wrong=0,
        validation_images=1,
        test_wrong=0,
        test_images=1,
    )


def test_networks_that_the_table_has_a_time_of_are_left_out() -> None:
    known = table_of(CHANNELS, lambda widths: 0.1 + sum(widths.values()) / 1000)
    narrow = dict.fromkeys(CHANNELS, BLOCK)
    timed = [narrow | widths for widths in (*known.networks(), *known.checks())]
    other = narrow | {"third": 48, "first": 48}
    assert list(untimed(known, [*timed, other])) == [other]


def test_random_networks_are_always_the_same_and_in_whole_blocks() -> None:
    known = table_of(CHANNELS, lambda widths: 0.1 + sum(widths.values()) / 1000)
    networks = list(random_widths(known))
    assert networks == list(random_widths(known))
    assert all(width % BLOCK == 0 for network in networks for width in network.values())
    assert sum(networks[0].values()) > 2 * sum(networks[-1].values())


def test_chosen_widths_are_spread_over_all_that_were_chosen() -> None:
    rows = [row("magnitude", width) for width in (300, 100, 200, 200)] + [row("uniform", 50)]
    assert chosen_widths(rows) == [{"first": width} for width in (100, 200, 300)]
    many = chosen_widths([row("magnitude", width) for width in range(100)])
    assert (len(many), many[0], many[-1]) == (8, {"first": 0}, {"first": 99})


def test_errors_are_told_by_where_the_widths_are_from() -> None:
    networks = [
        Network(widths={}, chosen=chosen, predicted_ms=predicted, measured_ms=measured)
        for chosen, predicted, measured in (
            (True, 0.9, 1.0), (True, 2.04, 2.0), (True, 3.0, 3.0), (False, 1.0, 1.0)
        )
    ]  # fmt: skip
    device = Device(machine="a processor", cores=1, backend="openvino", precision="int8", batch=1)
    about: dict[str, Any] = made_here("python -m experiments.predictions")
    found = Results(**about, inputs=[Input(side=32, device=device, timed_networks=1, networks=networks)])
    assert [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table(found).splitlines()[2:]
    ] == [
        ["32x32, chosen for a latency", "3", "1.000 to 3.000", "2.0 %", "10.0 %"],
        ["32x32, random", "1", "1.000 to 1.000", "0.0 %", "0.0 %"],
    ]
