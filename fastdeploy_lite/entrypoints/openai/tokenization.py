"""`POST /tokenize`: the tokens that a text or a conversation would be a prompt of."""

from __future__ import annotations

from typing import Any

from fastdeploy_lite.entrypoints.openai.output_parser import thinking_switch
from fastdeploy_lite.entrypoints.openai.protocol import TokenizeRequest
from fastdeploy_lite.entrypoints.openai.request_building import opens_answer
from fastdeploy_lite.entrypoints.openai.service import Service
from fastdeploy_lite.request.user_request import Request


def tokenized(body: TokenizeRequest, service: Service) -> dict[str, Any]:
    """Tokenise; blocking.

    Args:
        body: What the client sent.
        service: Whose tokenizer and template hold.

    Returns:
        `count`, `max_model_len`, `tokens` and `token_strs`, which is null unless asked for.

    Raises:
        RequestError: Template or messages cannot be used, or another model is served.
    """
    service.check_model(body.model)
    ids = service.preprocessor.prompt_token_ids(_request(body))
    texts = service.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
    limit = service.config.scheduler.max_model_len
    return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts}


def _request(body: TokenizeRequest) -> Request:
    if body.prompt is not None:
        return Request(prompt=body.prompt)
    variables = dict(body.chat_template_kwargs or {})
    switch = thinking_switch(variables, None)
    if switch is not None:  # as in a chat
        variables["enable_thinking"] = switch
    return Request(
        messages=body.messages,
        tools=[tool.model_dump(exclude_unset=True) for tool in body.tools or ()] or None,
        chat_template=body.chat_template,
        chat_template_kwargs=variables,
        trusted_template=False,
        add_generation_prompt=opens_answer(body.add_generation_prompt, body.continue_final_message),
        continue_final_message=bool(body.continue_final_message),
    )
