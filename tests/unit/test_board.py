"""The Grafana board: every query names a metric that a run exports; Prometheus itself reads them where it is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from skyrl.grafana import main
from skyrl.monitoring.board import ROWS, board, gauge_name, queries
from skyrl.monitoring.metrics import METRICS


def test_every_query_of_a_run_names_a_metric_of_the_table() -> None:
    known = {f"ray_{gauge_name(name)}" for name in (*METRICS, "step", "alarms")}
    asked = {name for query in queries() for name in re.findall(r"ray_skyrl_\w+", query)}
    assert len(asked) > 40 and asked - known == set()
    assert all('{run=~"mine"}' in query for query in queries("mine") if "skyrl" in query)


def test_panels_lie_side_by_side_and_have_numbers_of_their_own() -> None:
    panels, taken = board()["panels"], set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == list(ROWS)
    for panel in panels:
        letters = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(letters)) == len(letters) and (letters or panel["type"] == "row")


def test_the_command_writes_files_that_name_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a b"
    monkeypatch.setattr(
        "sys.argv", ["grafana", str(folder), "--prometheus", "http://host:9090", "--discovery", "/x.json"]
    )
    main()
    assert f"--config.file='{folder}'/prometheus.yml" in capsys.readouterr().out
    assert json.loads((folder / "dashboards" / "skyrl.json").read_text()) == board()
    (scrape,) = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    assert scrape["file_sd_configs"] == [{"files": ["/x.json"]}]
    provisioned = folder / "provisioning"
    assert f"provisioning = {provisioned}\n" in (folder / "grafana.ini").read_text()
    (source,) = yaml.safe_load((provisioned / "datasources" / "skyrl.yml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://host:9090")
    (provider,) = yaml.safe_load((provisioned / "dashboards" / "skyrl.yml").read_text())["providers"]
    assert provider["options"]["path"] == str(folder / "dashboards")
    monkeypatch.setattr("sys.argv", ["grafana", str(folder), "--prometheus", "host:9090"])
    with pytest.raises(SystemExit):
        main()
    assert "must begin with http:// or https://" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)")
def test_prometheus_reads_every_query_and_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["grafana", str(tmp_path)])
    main()
    rules = [{"record": f"board:{number}", "expr": query} for number, query in enumerate(queries())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    for command in (("rules", "rules.yml"), ("config", "prometheus.yml")):
        done = subprocess.run(
            ["promtool", "check", command[0], str(tmp_path / command[1])], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
