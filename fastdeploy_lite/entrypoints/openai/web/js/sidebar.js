// The list of conversations.
import { html, useEffect, useRef, useState } from "../vendor/preact-htm.js";
import { t } from "./i18n.js";
import { Icon, IconButton, Mark } from "./parts.js";
import { changed, changeSettings, openConversation, removeConversations, save, state } from "./store.js";

const DAY = 86_400_000;

function groupOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "today";
  if (time >= midnight - DAY) return "yesterday";
  return time >= midnight - 7 * DAY ? "week" : "older";
}

function matches(conversation, words) {
  const text = [conversation.title, ...conversation.messages.map((m) => m.content)].join("\n").toLowerCase();
  return words.every((word) => text.includes(word));
}

function Entry({ conversation }) {
  const [draft, setDraft] = useState(null);
  const title = conversation.title || t("untitled");
  const rename = () => {
    if (draft?.trim()) {
      conversation.title = draft.trim();
      save(conversation, true);
    }
    setDraft(null);
  };
  const keys = (event) => {
    if (event.key === "Enter" && !event.isComposing) rename();
    if (event.key === "Escape") setDraft(null);
  };
  const remove = () => confirm(t("removeAsk", { title })) && removeConversations([conversation.id]);
  if (draft !== null) {
    return html`<li><input class="rename" aria-label=${t("rename")} value=${draft} onBlur=${rename} onKeyDown=${keys}
      ref=${(node) => node && document.activeElement !== node && node.focus()} onInput=${(e) => setDraft(e.target.value)} /></li>`;
  }
  const active = conversation.id === state.currentId && state.tab === "chat";
  return html`<li class=${active ? "active" : ""}>
    <button class="open" aria-current=${active ? "page" : undefined} onClick=${() => openConversation(conversation.id)} onDblClick=${() => setDraft(title)}>
      ${state.running.has(conversation.id) && html`<i class="dot"></i>`}${title}</button>
    <span class="entry-actions">
      <${IconButton} icon="pencil" label=${t("rename")} onClick=${() => setDraft(title)} />
      <${IconButton} icon="trash-2" label=${t("remove")} onClick=${remove} />
    </span>
  </li>`;
}

export function newChat() {
  openConversation(null);
  requestAnimationFrame(() => document.querySelector(".composer textarea")?.focus());
}

export function Sidebar() {
  const [query, setQuery] = useState("");
  const search = useRef(null);
  useEffect(() => {
    const focus = () => search.current?.focus();
    addEventListener("fdl-search", focus);
    return () => removeEventListener("fdl-search", focus);
  }, []);
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = state.conversations.filter((c) => c.messages.length && matches(c, words));
  const groups = Map.groupBy?.(shown, (c) => groupOf(c.updated)) ?? grouped(shown);
  const some = state.conversations.some((c) => c.messages.length);
  const close = () => {
    if (state.drawer) state.drawer = false;
    else changeSettings({ sidebar: false });
    changed();
  };
  return html`<aside class="sidebar" aria-label=${t("chat")}>
    <div class="sidebar-top"><span class="brand"><${Mark} />fastdeploy_lite</span>
      <${IconButton} icon="panel-left" label=${t("hideSidebar")} onClick=${close} /></div>
    <button class="new" onClick=${newChat}><${Icon} name="square-pen" />${t("newChat")}</button>
    ${some && html`<label class="search"><${Icon} name="search" /><input type="search" ref=${search} placeholder=${t("search")}
      aria-label=${t("search")} value=${query} onInput=${(e) => setQuery(e.target.value)} /></label>`}
    <nav>
      ${!some && state.loaded && html`<p class="empty">${t("noChats")}</p>`}
      ${some && !shown.length && html`<p class="empty">${t("noMatch")}</p>`}
      ${["today", "yesterday", "week", "older"].filter((g) => groups.has(g)).map((group) => html`
        <h3>${t(group)}</h3>
        <ul>${groups.get(group).map((c) => html`<${Entry} key=${c.id} conversation=${c} />`)}</ul>`)}
    </nav>
    <button class="new foot" onClick=${() => { state.dialog = "settings"; changed(); }}><${Icon} name="settings-2" />${t("settings")}</button>
  </aside>`;
}

function grouped(list) {
  const groups = new Map();
  for (const c of list) groups.set(groupOf(c.updated), [...(groups.get(groupOf(c.updated)) ?? []), c]);
  return groups;
}
