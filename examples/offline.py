"""Without a server: a batch of chats, a stream, log-probabilities, seeds.

python examples/offline.py [MODEL]
"""

from __future__ import annotations

import sys

from fastdeploy_lite import LLM, SamplingParams


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "demo"
    llm = LLM(model=model, max_model_len=1024, enable_logprob=True)

    # Several conversations are answered together.
    chats = [
        [{"role": "user", "content": "解析三首李白的诗"}],
        [{"role": "user", "content": "What is a gourd?"}],
    ]
    greedy = SamplingParams(temperature=0, max_tokens=48)
    for output in llm.chat(chats, greedy, use_tqdm=False):
        print(f"[{len(output.outputs.token_ids)} tokens] {output.outputs.text}")

    # As it is made.
    for step in llm.generate("《静夜思》\n唐代·李白\n", greedy, use_tqdm=False, stream=True):
        for piece in step:
            if piece is not None:
                print(piece.outputs.text, end="", flush=True)
    print()

    # How sure the model was of its first token, and of the runners-up.
    sure = SamplingParams(temperature=0, max_tokens=1, logprobs=3)
    output = llm.generate("床前明月", sure, use_tqdm=False)[0]
    assert output.outputs.logprobs is not None
    for candidate in (output.outputs.logprobs[0] or {}).values():
        print(f"{candidate.decoded_token}{candidate.logprob:8.3f}")

    # The same seed, the same answer.
    warm = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=16, seed=7)
    first, second = (llm.generate("春眠不觉晓", warm, use_tqdm=False)[0] for _ in range(2))
    assert first.outputs.token_ids == second.outputs.token_ids
    print(first.outputs.text)


if __name__ == "__main__":
    main()
