"""The README: its Python runs, its table of models is that of the shipped specs, its example is the demo's."""

from __future__ import annotations

import re
from pathlib import Path

import flagen
from flagen import Input, bench_report, config, demo_example, specs
from flagen.__main__ import parser
from flagen.bench_shapes import SHAPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_python_blocks_run(capsys):
    # one after the other in one namespace, as a reader would type them
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    out = capsys.readouterr().out
    assert "d gate" in out, "check did not print its table"
    assert namespace["x"].grad is not None
    assert namespace["states"].shape == (3, 4, 32, 64)


def test_example_is_the_demos():
    source = Path(demo_example.__file__).read_text(encoding="utf-8")
    body = source.split('"""\n', 1)[1].strip()
    assert any(
        body.replace("from flagen import", "import flagen\nfrom flagen import") in one for one in blocks("python")
    )


def test_example_prints_as_shown():
    assert str(demo_example.my_attention) + "\n" in blocks("")


def test_every_model_is_in_the_table_as_it_ships():
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| `(Spec\(.*\))` \|$", README, flags=re.MULTILINE))
    assert set(rows) == set(specs.names())
    for name, text in rows.items():
        spec = specs.get(name)
        names = {key: getattr(flagen, key) for key in flagen.__all__} | {"abs": flagen.abs}
        names |= {one.name: Input(one.name, one.axes) for one in spec.inputs}
        names |= {one.name: one for one in spec.scalars}
        assert eval(text, names) == spec, name


def test_speeds_are_those_that_were_measured():
    rows = bench_report.latest(bench_report.read([ROOT / "benchmarks" / "results" / "h100.csv"]))
    tables = re.findall(r"(?:^\|.*\n)+", README.split("## Speed\n")[1].split("\n## ")[0], flags=re.MULTILINE)
    assert [one.splitlines() for one in tables] == [bench_report.markdown(rows), beside_the_peer()]


def beside_the_peer():
    """Forward and backward at shapes that are not large, of specs that have a peer there, in ms and the peer's best."""
    rows = bench_report.latest(bench_report.read([ROOT / "benchmarks" / "results" / "h200-shapes.csv"]))
    shapes = ("short2k", "small1k", "lone", "d256", "million")
    lines = [f"| spec | {' | '.join(','.join(map(str, SHAPES[name])) for name in shapes)} |"]
    lines.append(f"|{' --- |' * (len(shapes) + 1)}")
    for spec in ("retnet", "gla", "delta_net", "kda"):
        cells = []
        for shape in shapes:
            found = [one for one in rows if (one.spec, one.shape, one.what) == (spec, shape, "fwd+bwd")]
            own, peer = ([x.value for x in found if (x.library == "flagen") == mine] for mine in (True, False))
            cells.append(f"{own[0]:.3g} ({f'{min(peer):.3g}' if peer else '-'})" if own else "-")
        lines.append(f"| `{spec}` | {' | '.join(cells)} |")
    return lines


def test_every_variable_is_in_the_table():
    assert re.findall(r"^\| `(FLAGEN_\w+)` \|", README, flags=re.MULTILINE) == [one.name for one in config.VARIABLES]


def test_every_command_is_in_the_table():
    commands = next(action for action in parser()._actions if action.choices and "list" in action.choices)
    listed = re.findall(r"^\| `(\w+)[^`]*` \| [^`]", README.split("## The command line")[1], flags=re.MULTILINE)
    shown = re.findall(r"^\| `(\w+)", README.split("## The command line")[1].split("## ")[0], flags=re.MULTILINE)
    assert set(shown) == set(commands.choices), listed


def test_json_is_a_spec():
    (block,) = blocks("json")
    assert flagen.Spec.from_json(block).name == "my_gla"


def test_links_lead_to_headings():
    headings = re.findall(r"^## (.+)$", README, flags=re.MULTILINE)
    places = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= places


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
