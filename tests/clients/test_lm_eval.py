"""lm-eval, the evaluation harness: likelihoods over completions, answers over chat.

`TestRequests` sends what lm-eval 0.4.13 sends and reads the answer as it does, so that the service
is held to it where the harness is not installed; `TestHarness` runs the harness itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import ServerProcess, environment, running_server

FLAGS = ("--max-model-len", "1024", "--enable-logprob", "--num-gpu-blocks-override", "128")
PAIRS = [
    ("床前明月光，", "疑是地上霜。"),
    ("床前明月光，", "zebra quartz"),
    ("User: Hello\nAssistant:", " I am fine"),
    ("The moon", " is a planet"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo model behind HTTP."""
    with running_server(tmp_path_factory.mktemp("server"), FLAGS) as process:
        yield process


@pytest.fixture
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    """Plain HTTP."""
    with httpx.Client(base_url=server.url, timeout=120) as plain:
        yield plain


def encode(http: httpx.Client, text: str) -> list[int]:
    body = {"prompt": text, "add_special_tokens": False}
    return list(http.post("/tokenize", json=body).json()["tokens"])


def split_pair(http: httpx.Client, context: str, continuation: str) -> tuple[list[int], int]:
    """The harness's own: blanks at the end of the context go over; tokens of the whole, counted."""
    blanks = len(context) - len(context.rstrip())
    if blanks:
        context, continuation = context[:-blanks], context[-blanks:] + continuation
    return encode(http, context + continuation), len(encode(http, context))


def expected_score(http: httpx.Client, ids: list[int], start: int) -> tuple[float, bool]:
    """Likelihood of the tokens from `start` on: each is forced after those before it.

    Nothing here is shared with the scoring of prompts: every number comes from a generated token.
    """
    total, greedy = 0.0, True
    for place in range(start, len(ids)):
        fields = {"logprobs": 1, "logit_bias": {str(ids[place]): 100}, "return_token_ids": True}
        body = {"prompt": ids[:place], "max_tokens": 2, "temperature": 0, **fields}
        choice = http.post("/v1/completions", json=body).json()["choices"][0]
        assert choice["completion_token_ids"][0] == ids[place]
        rows = choice["logprobs"]
        total += rows["token_logprobs"][0]
        greedy &= rows["token_logprobs"][0] == max(rows["top_logprobs"][0].values())
    return total, greedy


class TestRequests:
    """Bodies and arithmetic of the harness, without it."""

    def test_what_makes_it_use_the_servers_tokenizer(self, http: httpx.Client) -> None:
        info = http.get("/tokenizer_info").json()
        assert info["eos_token"] == "</s>"
        assert encode(http, "</s>") == [2]
        assert encode(http, info["bos_token"]) == [1]
        ids = encode(http, "床前明月光，hello")
        assert (
            http.post("/detokenize", json={"tokens": ids}).json()["prompt"] == "床前明月光，hello"
        )
        assert info["chat_template"]

    @pytest.mark.parametrize("tokenized", [True, False])
    def test_likelihoods(self, http: httpx.Client, tokenized: bool) -> None:
        pairs = [split_pair(http, *pair) for pair in PAIRS]
        prompts = [
            ids if tokenized else "".join(p) for (ids, _), p in zip(pairs, PAIRS, strict=True)
        ]
        body = {
            "model": "demo", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1,
            "seed": 1234, "echo": True,
        }  # fmt: skip
        choices = http.post("/v1/completions", json=body).json()["choices"]
        for choice, (ids, start) in zip(choices, pairs, strict=True):
            rows = choice["logprobs"]
            scores = rows["token_logprobs"][start:-1]
            tops = [max(top.values()) for top in rows["top_logprobs"][start:-1]]
            total, greedy = expected_score(http, ids, start)
            assert sum(scores) == pytest.approx(total, abs=1e-3)
            assert (scores == tops) is greedy
        totals = [
            sum(c["logprobs"]["token_logprobs"][s:-1])
            for c, (_, s) in zip(choices, pairs, strict=True)
        ]
        assert totals[0] > totals[1] + 10  # the poem's line against nonsense

    def test_answers_until_a_text(self, http: httpx.Client) -> None:
        """The stop text stays, as upstream's; `FD_LITE_STRIP_STOP_TEXT=1` takes it off."""
        fields = {"model": "demo", "max_tokens": 64, "temperature": 0, "seed": 1234}
        body = {"prompt": [encode(http, "床前明月光，")], **fields}
        free = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
        stop = free[5]
        cut = http.post("/v1/completions", json={**body, "stop": [stop, "</s>"]}).json()
        assert cut["choices"][0]["text"] == free[: free.index(stop) + 1]
        ask = {"messages": [{"role": "user", "content": "Hello"}], "stop": ["。", "</s>"], **fields}
        answer = http.post("/v1/chat/completions", json=ask).json()
        assert answer["choices"][0]["message"]["content"]


TASK = """\
task: fd_lite_tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


class TestHarness:
    """The harness itself; `pip install 'lm-eval[api]'`, 0.4.13 of which needs no torch."""

    def model(self, server: ServerProcess, name: str, path: str, **options: Any) -> Any:
        models = pytest.importorskip("lm_eval.models.openai_completions")
        return getattr(models, name)(base_url=server.url + path, model="demo", **options)

    def instance(self, kind: str, arguments: tuple[Any, ...]) -> Any:
        instance = pytest.importorskip("lm_eval.api.instance").Instance
        return instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_likelihoods(self, server: ServerProcess, http: httpx.Client, batch_size: int) -> None:
        lm = self.model(server, "LocalCompletionsAPI", "/v1/completions", batch_size=batch_size)
        assert lm.tokenizer_backend == "remote"
        asked = [self.instance("loglikelihood", pair) for pair in PAIRS]
        for (total, greedy), pair in zip(lm.loglikelihood(asked), PAIRS, strict=True):
            expected = expected_score(http, *split_pair(http, *pair))
            assert total == pytest.approx(expected[0], abs=1e-3)
            assert greedy is expected[1]

    def test_answers(self, server: ServerProcess) -> None:
        options = {"until": ["\n\n"], "max_gen_toks": 64}
        lm = self.model(server, "LocalCompletionsAPI", "/v1/completions")
        [text] = lm.generate_until([self.instance("generate_until", ("床前明月光，", options))])
        assert text
        chat = self.model(server, "LocalChatCompletion", "/v1/chat/completions")
        asked = chat.apply_chat_template([{"role": "user", "content": "Hello"}])
        [answer] = chat.generate_until([self.instance("generate_until", (asked, options))])
        assert answer

    def test_a_task(self, server: ServerProcess, http: httpx.Client, tmp_path: Path) -> None:
        """The model's own continuation beats a foreign one in each question."""
        pytest.importorskip("lm_eval")
        rows = []
        for question in ("床前明月光", "Hello, how are you", "The moon"):
            body = {"prompt": question, "max_tokens": 8, "temperature": 0}
            best = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
            rows.append({"question": question, "choices": [" zebra quartz", best], "answer": 1})
        data = tmp_path / "test.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "fd_lite_tiny.yaml").write_text(TASK.format(data=data))
        arguments = f"model=demo,base_url={server.url}/v1/completions"
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        run = subprocess.run(
            [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args",
             arguments, "--tasks", "fd_lite_tiny", "--include_path", str(tmp_path),
             "--output_path", str(tmp_path / "out")],
            check=False, capture_output=True, text=True, timeout=300,
            env=environment({**os.environ, **offline}),
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-2000:]
        [result] = (tmp_path / "out").rglob("results*.json")
        assert json.loads(result.read_text())["results"]["fd_lite_tiny"]["acc,none"] == 1.0
