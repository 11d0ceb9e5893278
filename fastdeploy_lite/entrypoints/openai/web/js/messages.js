// The messages of a conversation.
import { Component, html, useLayoutEffect, useRef, useState } from "../vendor/preact-htm.js";
import {
  answerCall, canDrop, dropOldest, editUser, firstTokenSeconds, regenerate, tokenRate,
} from "./chat.js";
import { number, t } from "./i18n.js";
import { copyText, showMarkdown } from "./markdown.js";
import { Icon, IconButton } from "./parts.js";

function Markdown({ text }) {
  const ref = useRef(null);
  useLayoutEffect(() => showMarkdown(ref.current, text), [text]);
  return html`<div class="md" ref=${ref}></div>`;
}

function CopyButton({ text }) {
  const [done, setDone] = useState(false);
  const copy = async () => {
    if (await copyText(text)) {
      setDone(true);
      setTimeout(() => setDone(false), 1500);
    }
  };
  return html`<${IconButton} icon=${done ? "check" : "copy"} label=${done ? t("copied") : t("copy")} onClick=${copy} />`;
}

function Thinking({ message }) {
  const { thinkingSeconds } = message.stats ?? {};
  const busy = message.state === "running" && thinkingSeconds === undefined;
  const label = busy ? t("thinking")
    : thinkingSeconds === undefined ? t("thoughtPlain") : t("thought", { seconds: number(thinkingSeconds, 1) });
  return html`<details class="thinking">
    <summary class=${busy ? "pulse" : ""}><${Icon} name="chevron-right" />${label}</summary>
    <${Markdown} text=${message.reasoning} />
  </details>`;
}

function prettyJson(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // still being written
  }
}

function ToolCall({ conversation, message, call }) {
  const [text, setText] = useState("");
  const answered = conversation.messages.some((m) => m.role === "tool" && m.callId === call.id);
  const send = (event) => {
    event.preventDefault();
    answerCall(conversation, message, call, text);
  };
  const open = message.state === "done" && !answered;
  return html`<div class="tool">
    <div class="tool-head"><${Icon} name="wrench" />${t("toolCall", { name: call.name })}</div>
    <pre>${prettyJson(call.arguments)}</pre>
    ${open && html`<form onSubmit=${send}>
      <textarea rows="2" aria-label=${t("giveResult")} placeholder=${t("giveResult")} value=${text}
        onInput=${(e) => setText(e.target.value)}></textarea>
      <button class="button small" disabled=${!text.trim()}>${t("sendResult")}</button>
    </form>`}
  </div>`;
}

function Stats({ message }) {
  const { stats } = message;
  const rate = tokenRate(message);
  const first = firstTokenSeconds(message);
  const parts = [];
  if (rate !== null) parts.push(t("rate", { rate: number(rate, rate < 100 ? 1 : 0) }));
  if (first !== null) parts.push(t("ttft", { seconds: number(first, 2) }));
  if (stats?.tokens) parts.push(t("tokens", { count: number(stats.tokens) }));
  if (stats?.cached) parts.push(t("cached", { cached: number(stats.cached), prompt: number(stats.prompt) }));
  else if (stats?.prompt) parts.push(t("prompt", { prompt: number(stats.prompt) }));
  return html`<span class="stats">${parts.map((part) => html`<span>${part}</span>`)}</span>`;
}

const notes = {
  stopped: () => t("stopped"),
  interrupted: () => t("interrupted"),
  done: (message) => (message.finish === "length" ? t("cutOff", { count: number(message.stats?.tokens ?? 0) }) : ""),
};

function Failure({ conversation, message }) {
  const tooLong = message.status === 400 && canDrop(conversation);
  return html`<div class="failure" role="alert">
    <${Icon} name="circle-alert" />
    <div><strong>${t("failed")}</strong><p>${message.error}</p>
      <div class="row">
        <button class="button small" onClick=${() => regenerate(conversation, message)}>${t("retry")}</button>
        ${tooLong && html`<button class="button small" onClick=${() => dropOldest(conversation, message)}>${t("dropOldest")}</button>`}
      </div>
    </div>
  </div>`;
}

function Answer({ conversation, message, busy }) {
  const running = message.state === "running";
  const empty = !message.content && !message.reasoning && !message.calls?.length;
  const note = notes[message.state]?.(message);
  return html`<article class="answer" aria-busy=${running} aria-label=${t("model")}>
    ${message.reasoning && html`<${Thinking} message=${message} />`}
    ${running && empty && html`<div class="waiting" role="status" aria-label=${t("waiting")}><i></i><i></i><i></i></div>`}
    ${message.content && html`<${Markdown} text=${message.content} />`}
    ${message.calls?.filter(Boolean).map((call) => html`<${ToolCall} key=${call.id} conversation=${conversation} message=${message} call=${call} />`)}
    ${message.state === "failed" && html`<${Failure} conversation=${conversation} message=${message} />`}
    <footer class=${running ? "live" : ""}>
      ${!running && !empty && html`<${CopyButton} text=${message.content} />`}
      ${!busy && message.state !== "failed" && html`<${IconButton} icon="refresh-cw" label=${t("regenerate")} onClick=${() => regenerate(conversation, message)} />`}
      ${note && html`<span class="note">${note}</span>`}
      <${Stats} message=${message} />
    </footer>
  </article>`;
}

function Question({ conversation, message, busy }) {
  const [draft, setDraft] = useState(null);
  const send = () => {
    editUser(conversation, message, draft);
    setDraft(null);
  };
  const keys = (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      setDraft(null);
    }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  };
  if (draft !== null) {
    return html`<article class="question editing">
      <textarea class="edit" aria-label=${t("edit")} rows=${Math.min(draft.split("\n").length + 1, 12)} value=${draft}
        ref=${(node) => node && document.activeElement !== node && node.focus()}
        onInput=${(e) => setDraft(e.target.value)} onKeyDown=${keys}></textarea>
      <div class="row end">
        <button class="button small" onClick=${() => setDraft(null)}>${t("cancel")}</button>
        <button class="button small primary" onClick=${send} disabled=${!draft.trim()}>${t("saveSend")}</button>
      </div>
    </article>`;
  }
  return html`<article class="question" aria-label=${t("you")}>
    <div class="bubble">${message.content}</div>
    <footer>
      <${CopyButton} text=${message.content} />
      ${!busy && html`<${IconButton} icon="pencil" class="edit-button" label=${t("edit")} onClick=${() => setDraft(message.content)} />`}
    </footer>
  </article>`;
}

const ToolResult = ({ message }) => html`<article class="tool result">
  <div class="tool-head"><${Icon} name="check" />${t("toolResult", { name: message.name })}</div>
  <pre>${message.content}</pre>
</article>`;

/** Rendered again only when its own message, the language or the state of the conversation changes. */
class Message extends Component {
  shouldComponentUpdate(next) {
    const now = this.props;
    return now.rev !== next.rev || now.busy !== next.busy || now.language !== next.language
      || now.message !== next.message || now.state !== next.state || now.count !== next.count;
  }

  render({ conversation, message, busy }) {
    const kinds = { user: Question, assistant: Answer, tool: ToolResult };
    return html`<${kinds[message.role]} conversation=${conversation} message=${message} busy=${busy} />`;
  }
}

export const Messages = ({ conversation, busy, language }) => html`
  ${conversation.messages.map((message, i) => html`
    ${conversation.skip === i && i > 0 && html`<div class="dropped">${t("dropped", { count: i })}</div>`}
    <${Message} key=${message.id} conversation=${conversation} message=${message} rev=${message.rev}
      state=${message.state} busy=${busy} language=${language}
      count=${message.calls?.length ? conversation.messages.length : 0} />`)}`;
