// What happens when somebody sends, stops, edits or regenerates.
import { ApiError, streamChat } from "./api.js";
import { t } from "./i18n.js";
import { changed, createConversation, current, isRunning, newId, save, state, touched } from "./store.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "repetition_penalty", "seed"];
const TITLE_LENGTH = 48;

const changedMessage = (message) => {
  message.rev = (message.rev ?? 0) + 1;
  changed();
};

export function sendText(text) {
  const content = text.trim();
  const conversation = current() ?? createConversation();
  if (!content || isRunning(conversation)) return false;
  if (!conversation.title) {
    const line = content.replace(/\s+/g, " ");
    const letters = [...line];
    conversation.title =
      letters.length > TITLE_LENGTH ? `${letters.slice(0, TITLE_LENGTH - 1).join("")}…` : line;
  }
  conversation.messages.push({ id: newId(), role: "user", content });
  generate(conversation);
  return true;
}

export function stop(conversation) {
  state.running.get(conversation.id)?.abort();
}

/** Answer again from a message on; it and everything after it are replaced. */
export function regenerate(conversation, message) {
  if (isRunning(conversation)) return;
  conversation.messages.splice(conversation.messages.indexOf(message));
  generate(conversation);
}

export function editUser(conversation, message, text) {
  if (isRunning(conversation) || !text.trim()) return;
  conversation.messages.splice(conversation.messages.indexOf(message) + 1);
  message.content = text.trim();
  changedMessage(message);
  generate(conversation);
}

/** Give the result of a tool call back; when all are there the model goes on. */
export function answerCall(conversation, message, call, content) {
  if (isRunning(conversation)) return;
  conversation.messages.push({ id: newId(), role: "tool", callId: call.id, name: call.name, content });
  const answered = new Set(conversation.messages.filter((m) => m.role === "tool").map((m) => m.callId));
  changedMessage(message);
  if (message.calls.every((c) => answered.has(c.id))) generate(conversation);
  else touched(conversation);
}

/** Leave the oldest turn out of what is sent, and try again. */
export function dropOldest(conversation, message) {
  if (isRunning(conversation)) return;
  const kept = conversation.messages.slice(conversation.skip ?? 0, conversation.messages.indexOf(message));
  const next = kept.findIndex((m, i) => i > 0 && m.role === "user");
  if (next > 0) conversation.skip = (conversation.skip ?? 0) + next;
  regenerate(conversation, message);
}

export const canDrop = (conversation) =>
  conversation.messages.slice(conversation.skip ?? 0).filter((m) => m.role === "user").length > 1;

function wireMessages(conversation) {
  const wire = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const message of conversation.messages.slice(conversation.skip ?? 0)) {
    if (message.role === "tool") {
      wire.push({ role: "tool", tool_call_id: message.callId, content: message.content });
    } else if (message.role === "user") {
      wire.push({ role: "user", content: message.content });
    } else if (message.content || message.calls?.length) {
      const calls = message.calls?.map(({ id, name, arguments: text }) =>
        ({ id, type: "function", function: { name, arguments: text } }));
      wire.push({ role: "assistant", content: message.content, ...(calls?.length && { tool_calls: calls }) });
    }
  }
  return wire;
}

/** The tools of a text, or an error; nothing for an empty text. */
export function parseTools(text) {
  if (!text.trim()) return undefined;
  const tools = JSON.parse(text);
  if (!Array.isArray(tools) || !tools.every((tool) => tool?.function?.name)) {
    throw new Error('[{"type": "function", "function": {"name": …}}]');
  }
  return tools;
}

function requestBody(conversation) {
  const body = { model: state.model?.id ?? "default", messages: wireMessages(conversation) };
  for (const name of NUMBERS) {
    const value = conversation.sampling[name];
    if (typeof value === "number" && Number.isFinite(value)) body[name] = value;
  }
  const { thinking } = conversation.sampling;
  if (thinking) body.chat_template_kwargs = { enable_thinking: thinking === "on" };
  try {
    const tools = parseTools(conversation.tools ?? "");
    if (tools?.length) body.tools = tools;
  } catch (error) {
    throw new ApiError(0, t("toolsBad", { error: error.message }));
  }
  return body;
}

export async function generate(conversation) {
  const controller = new AbortController();
  const message = {
    id: newId(), role: "assistant", content: "", reasoning: "", calls: [], state: "running",
    stats: { started: performance.now(), tokens: 0 },
  };
  conversation.messages.push(message);
  state.running.set(conversation.id, controller);
  touched(conversation);
  try {
    for await (const event of streamChat(requestBody(conversation), controller.signal)) {
      takeEvent(message, event);
      save(conversation);
      changedMessage(message);
    }
    message.state = "done";
    state.online = true;
  } catch (error) {
    fail(message, error, controller.signal.aborted);
  } finally {
    closeThinking(message);
    state.running.delete(conversation.id);
    changedMessage(message);
    touched(conversation);
  }
}

function fail(message, error, aborted) {
  if (aborted) {
    message.state = "stopped";
    return;
  }
  message.state = "failed";
  message.error = error instanceof ApiError ? error.message : t("offline");
  message.status = error.status ?? 0;
  if (error.status === 401) state.keyAsked = "missing";
}

function takeEvent(message, event) {
  const { stats } = message;
  if (event.usage) {
    stats.prompt = event.usage.prompt_tokens;
    stats.tokens = event.usage.completion_tokens;
    stats.total = event.usage.total_tokens;
    stats.cached = event.usage.prompt_tokens_details?.cached_tokens ?? 0;
    stats.exact = true;
  }
  const choice = event.choices?.[0];
  if (!choice) return;
  if (choice.finish_reason) message.finish = choice.finish_reason;
  const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta ?? {};
  if (!content && !reasoning && !calls?.length) return;
  const now = performance.now();
  stats.first ??= now;
  stats.last = now;
  if (!stats.exact) stats.tokens += 1;
  if (reasoning) {
    stats.thinkingSince ??= now;
    message.reasoning += reasoning;
  }
  if (content || calls?.length) closeThinking(message, now);
  if (content) message.content += content;
  for (const part of calls ?? []) takeCall(message.calls, part);
}

function closeThinking({ stats }, now = performance.now()) {
  if (stats.thinkingSince !== undefined && stats.thinkingSeconds === undefined) {
    stats.thinkingSeconds = (now - stats.thinkingSince) / 1000;
  }
}

function takeCall(calls, part) {
  const call = (calls[part.index] ??= { id: part.id ?? newId(), name: "", arguments: "" });
  if (part.id) call.id = part.id;
  if (part.function?.name) call.name += part.function.name;
  if (part.function?.arguments) call.arguments += part.function.arguments;
}

/** Tokens per second of decoding; null while there are too few to say. */
export function tokenRate({ stats }) {
  const seconds = ((stats?.last ?? 0) - (stats?.first ?? 0)) / 1000;
  return seconds > 0 && stats.tokens > 3 ? (stats.tokens - 1) / seconds : null;
}

export const firstTokenSeconds = ({ stats }) =>
  stats?.first === undefined ? null : (stats.first - stats.started) / 1000;

/** Tokens of the context that the conversation takes, as far as the server has said. */
export function contextTokens(conversation) {
  const last = conversation?.messages.findLast((m) => m.role === "assistant" && m.stats?.total);
  const running = conversation?.messages.at(-1);
  const growing = running?.state === "running" && running !== last ? running.stats.tokens : 0;
  return (last?.stats.total ?? 0) + growing;
}
