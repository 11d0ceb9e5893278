// Where a message is written, with the use of the context below it.
import { html, useEffect, useLayoutEffect, useRef, useState } from "../vendor/preact-htm.js";
import { contextTokens, sendText, stop } from "./chat.js";
import { number, t } from "./i18n.js";
import { Icon } from "./parts.js";
import { changed, isRunning, state } from "./store.js";

const NEARLY_FULL = 0.85;

function Context({ conversation }) {
  const limit = state.model?.max_model_len;
  const used = contextTokens(conversation);
  if (!limit || !used) return null;
  const share = Math.min(used / limit, 1);
  const title = t("contextTitle", { used: number(used), limit: number(limit) });
  return html`<span class=${`context ${share > NEARLY_FULL ? "full" : ""}`} title=${title}>
    <span>${t("context")}</span><meter min="0" max=${limit} value=${used} aria-label=${title}></meter>
    <span>${number(used)} / ${number(limit)}</span></span>`;
}

export function Composer({ conversation }) {
  const [text, setText] = useState("");
  const area = useRef(null);
  const running = isRunning(conversation);
  useEffect(() => {
    if (matchMedia("(pointer: fine)").matches) area.current?.focus();
  }, [state.currentId]);
  useLayoutEffect(() => {
    const node = area.current;
    node.style.height = "auto";
    node.style.height = `${Math.min(node.scrollHeight, innerHeight * 0.4)}px`;
  }, [text]);
  const send = () => {
    if (sendText(text)) setText("");
  };
  const keys = (event) => {
    // An input method's Enter chooses a candidate; it does not send.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
      event.preventDefault();
      if (!running) send();
    } else if (event.key === "ArrowUp" && !text && !running) {
      const edits = document.querySelectorAll(".question .edit-button");
      edits[edits.length - 1]?.click();
    }
  };
  const submit = (event) => {
    event.preventDefault();
    running ? stop(conversation) : send();
  };
  const name = state.model?.id;
  return html`<form class="composer" onSubmit=${submit}>
    <div class="box">
      <textarea ref=${area} rows="1" value=${text} onInput=${(e) => setText(e.target.value)} onKeyDown=${keys}
        aria-label=${t("placeholderPlain")} enterkeyhint="send"
        placeholder=${name ? t("placeholder", { model: name }) : t("placeholderPlain")}></textarea>
      <button class="send" aria-label=${running ? t("stop") : t("send")} title=${running ? t("stop") : t("send")}
        disabled=${!running && !text.trim()}><${Icon} name=${running ? "square" : "arrow-up"} /></button>
    </div>
    <div class="below">
      <${Context} conversation=${conversation} />
      <span class="hint">${text ? t("hint") : ""}</span>
      <button type="button" class="link" onClick=${() => { state.dialog = "settings"; changed(); }}>${settingsLine(conversation)}</button>
    </div>
  </form>`;
}

/** What differs from the model's defaults, in a few words. */
function settingsLine(conversation) {
  const { sampling = {}, system = "", tools = "" } = conversation ?? state.settings;
  const parts = [];
  if (system.trim()) parts.push(t("system"));
  if (typeof sampling.temperature === "number") parts.push(`${t("temperature")} ${sampling.temperature}`);
  if (typeof sampling.top_p === "number") parts.push(`${t("topP")} ${sampling.top_p}`);
  if (sampling.thinking) parts.push(`${t("thinkingMode")}: ${t(sampling.thinking)}`);
  if (tools.trim()) parts.push(t("tools"));
  return parts.length ? parts.join(" · ") : t("settings");
}
