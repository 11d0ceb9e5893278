// The dialogs: settings, keyboard, key.
import { html, useRef, useState } from "../vendor/preact-htm.js";
import { apiKey, setApiKey } from "./api.js";
import { parseTools } from "./chat.js";
import { t } from "./i18n.js";
import { Dialog, download } from "./parts.js";
import {
  asMarkdown, changed, changeSettings, current, exportConversations, importConversations,
  removeConversations, save, state,
} from "./store.js";

const FIELDS = [
  ["temperature", "temperature", { min: 0, max: 2, step: 0.05 }],
  ["top_p", "topP", { min: 0, max: 1, step: 0.01 }],
  ["top_k", "topK", { min: 0, step: 1 }],
  ["repetition_penalty", "repetition", { min: 0.01, max: 2, step: 0.01 }],
  ["max_tokens", "maxTokens", { min: 1, step: 1 }],
  ["seed", "seed", { min: 0, step: 1 }],
];

const Choice = ({ label, value, options, onChange }) => html`<div class="field" role="radiogroup" aria-label=${label}>
  <span>${label}</span>
  <div class="segments">${options.map(([key, text]) => html`<button type="button" role="radio" aria-checked=${value === key}
    class=${value === key ? "on" : ""} onClick=${() => onChange(key)}>${text}</button>`)}</div>
</div>`;

function ConversationSettings({ target, change }) {
  const [problem, setProblem] = useState("");
  const sampling = target.sampling;
  const set = (name, text) => {
    const value = text === "" ? undefined : Number(text);
    change({ sampling: { ...sampling, [name]: value } });
  };
  const tools = (text) => {
    change({ tools: text });
    try {
      parseTools(text);
      setProblem("");
    } catch (error) {
      setProblem(t("toolsBad", { error: error.message }));
    }
  };
  return html`<section>
    <h3>${t("conversation")}</h3>
    <label class="field column"><span>${t("system")}</span>
      <textarea rows="3" name="system" placeholder=${t("systemHint")} value=${target.system} onInput=${(e) => change({ system: e.target.value })}></textarea></label>
    <p class="help">${t("samplingHint")}</p>
    <div class="grid">${FIELDS.map(([name, label, limits]) => html`<label class="field column"><span>${t(label)}</span>
      <input type="number" name=${name} inputmode="decimal" ...${limits} value=${sampling[name] ?? ""} onInput=${(e) => set(name, e.target.value)} /></label>`)}</div>
    <${Choice} label=${t("thinkingMode")} value=${sampling.thinking ?? ""} options=${[["", t("auto")], ["on", t("on")], ["off", t("off")]]}
      onChange=${(value) => change({ sampling: { ...sampling, thinking: value } })} />
    <details class="field column"><summary>${t("tools")}</summary>
      <p class="help">${t("toolsHint")}</p>
      <textarea rows="6" name="tools" class="mono" spellcheck="false" value=${target.tools ?? ""} onInput=${(e) => tools(e.target.value)}></textarea>
      ${problem && html`<p class="problem" role="alert">${problem}</p>`}
    </details>
  </section>`;
}

function PageSettings() {
  const file = useRef(null);
  const [said, setSaid] = useState("");
  const { language, theme } = state.settings;
  const conversation = current();
  const load = async (event) => {
    try {
      setSaid(t("imported", { count: importConversations(await event.target.files[0].text()) }));
    } catch {
      setSaid(t("importBad"));
    }
  };
  const clear = () => {
    const ids = state.conversations.map((c) => c.id);
    if (confirm(t("removeAllAsk", { count: ids.length }))) removeConversations(ids);
  };
  return html`<section>
    <h3>${t("page")}</h3>
    <${Choice} label=${t("language")} value=${language} options=${[["", t("system_")], ["en", "English"], ["zh", "中文"]]}
      onChange=${(value) => changeSettings({ language: value })} />
    <${Choice} label=${t("theme")} value=${theme} options=${[["", t("system_")], ["light", t("light")], ["dark", t("dark")]]}
      onChange=${(value) => changeSettings({ theme: value })} />
    <div class="field"><span>${t("keyTitle")}</span>
      <form class="row" onSubmit=${(e) => e.preventDefault()}><input type="password" name="key" autocomplete="off" value=${apiKey()} onChange=${(e) => { setApiKey(e.target.value.trim()); changed(); }} /></form></div>
    <div class="field"><span>${t("data")}</span><div class="row">
      <button class="button small" onClick=${() => download("conversations.json", exportConversations(), "application/json")}>${t("exportAll")}</button>
      <button class="button small" onClick=${() => file.current.click()}>${t("importAll")}</button>
      ${conversation && html`<button class="button small" onClick=${() => download("conversation.md", asMarkdown(conversation), "text/markdown")}>${t("exportOne")}</button>`}
      <input type="file" accept="application/json,.json" hidden ref=${file} onChange=${load} /></div></div>
    <div class="field"><span class="help">${said || t("path")}</span>
      ${state.conversations.length > 0 && html`<button class="button small danger" onClick=${clear}>${t("removeAll")}</button>`}</div>
  </section>`;
}

export function Settings() {
  const conversation = current();
  const target = conversation ?? state.settings;
  // A change holds for this conversation and for those that will be begun after it.
  const change = (values) => {
    if (conversation) {
      Object.assign(conversation, values);
      save(conversation);
    }
    changeSettings(values);
  };
  const close = () => { state.dialog = null; changed(); };
  return html`<${Dialog} title=${t("settings")} onClose=${close}>
    <${ConversationSettings} target=${target} change=${change} />
    <${PageSettings} />
  </${Dialog}>`;
}

const modifier = /Mac|iPhone|iPad/.test(navigator.platform) ? "⌘" : "Ctrl";

export function Shortcuts() {
  const rows = [
    ["kSend", ["Enter"]], ["kLine", ["Shift", "Enter"]], ["kStop", ["Esc"]], ["kEdit", ["↑"]],
    ["kFocus", ["/"]], ["kNew", [modifier, "Shift", "O"]], ["kSearch", [modifier, "K"]],
    ["kTab", [modifier, "."]], ["kHelp", ["?"]],
  ];
  const close = () => { state.dialog = null; changed(); };
  return html`<${Dialog} title=${t("shortcuts")} onClose=${close} class="narrow"><dl class="keys">
    ${rows.map(([text, keys]) => html`<dt>${t(text)}</dt><dd>${keys.map((key) => html`<kbd>${key}</kbd>`)}</dd>`)}
  </dl></${Dialog}>`;
}

export function KeyDialog({ connect }) {
  const [key, setKey] = useState("");
  const submit = (event) => {
    event.preventDefault();
    setApiKey(key.trim());
    connect();
  };
  const close = () => { state.keyAsked = null; changed(); };
  return html`<${Dialog} title=${t("keyTitle")} onClose=${close} class="narrow"><form onSubmit=${submit}>
    <p>${t("keyText")}</p>
    ${state.keyAsked === "wrong" && html`<p class="problem" role="alert">${t("keyWrong")}</p>`}
    <div class="row"><input type="password" name="ask-key" autocomplete="off" autofocus value=${key} onInput=${(e) => setKey(e.target.value)} aria-label=${t("keyTitle")} />
      <button class="button primary" disabled=${!key.trim()}>${t("keySave")}</button></div>
  </form></${Dialog}>`;
}
