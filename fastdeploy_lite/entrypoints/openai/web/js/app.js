// The page: conversations at the left, one of them or the server's state at the right.
import { html, render, useEffect, useLayoutEffect, useRef, useState } from "../vendor/preact-htm.js";
import { models } from "./api.js";
import { sendText, stop } from "./chat.js";
import { Composer } from "./composer.js";
import { language, t } from "./i18n.js";
import { Messages } from "./messages.js";
import { Icon, IconButton, Mark } from "./parts.js";
import { Server } from "./server.js";
import { KeyDialog, Settings, Shortcuts } from "./settings.js";
import { newChat, Sidebar } from "./sidebar.js";
import {
  applySettings, changed, changeSettings, current, flush, isRunning, loadConversations, state, useStore,
} from "./store.js";

const RETRY_MS = 3000;
const NEAR_END = 80;

async function connect() {
  try {
    [state.model] = await models();
    state.online = true;
    state.keyAsked = null;
  } catch (error) {
    if (error.status === 401) state.keyAsked = state.keyAsked === null ? "missing" : "wrong";
    else {
      state.online = false;
      setTimeout(connect, RETRY_MS);
    }
  }
  changed();
}

const DEMO = ["ex1", "ex5", "ex2", "ex6"];
const GENERAL = ["ex3", "ex4", "ex7", "ex8"];

function Welcome() {
  const demo = state.model?.id === "demo";
  return html`<div class="welcome">
    <${Mark} /><h1>${t("greeting")}</h1>
    ${demo && html`<p class="help">${t("demoHint")}</p>`}
    ${state.model && html`<div class="examples">${(demo ? DEMO : GENERAL).map((key) => html`
      <button onClick=${() => sendText(t(`${key}p`))}><strong>${t(key)}</strong><span>${t(`${key}p`)}</span></button>`)}</div>`}
  </div>`;
}

function Conversation({ conversation }) {
  const scroller = useRef(null);
  const follows = useRef(true);
  const [away, setAway] = useState(false);
  const count = conversation.messages.length;
  const toEnd = () => {
    follows.current = true;
    scroller.current.scrollTop = scroller.current.scrollHeight;
  };
  useLayoutEffect(toEnd, [conversation.id, count]);
  useLayoutEffect(() => {
    if (follows.current) scroller.current.scrollTop = scroller.current.scrollHeight;
  });
  const scrolled = () => {
    const { scrollHeight, scrollTop, clientHeight } = scroller.current;
    follows.current = scrollHeight - scrollTop - clientHeight < NEAR_END;
    setAway(!follows.current);
  };
  return html`<div class="scroller" ref=${scroller} onScroll=${scrolled}>
    <div class="thread" role="log"><${Messages} conversation=${conversation} busy=${isRunning(conversation)} language=${language()} /></div>
    ${away && html`<${IconButton} icon="arrow-down" class="to-end" label=${t("toBottom")} onClick=${toEnd} />`}
  </div>`;
}

function Chat() {
  const conversation = current();
  const open = conversation?.messages.length > 0;
  return html`<main class=${`chat ${open ? "" : "fresh"}`}>
    ${!state.online && html`<div class="offline" role="status">${t("offline")}</div>`}
    ${state.notice && html`<div class="offline" role="alert">${state.notice}</div>`}
    ${open ? html`<${Conversation} key=${conversation.id} conversation=${conversation} />` : state.loaded && html`<${Welcome} />`}
    <${Composer} conversation=${conversation} />
  </main>`;
}

function setTab(tab) {
  state.tab = tab;
  history.replaceState(null, "", tab === "server" ? "#server" : location.pathname + location.search);
  changed();
}

function Header() {
  const tab = (name, icon) => html`<button role="tab" aria-selected=${state.tab === name} class=${state.tab === name ? "on" : ""}
    onClick=${() => setTab(name)}><${Icon} name=${icon} /><span>${t(name)}</span></button>`;
  const show = () => {
    state.drawer = true;
    changeSettings({ sidebar: true });
  };
  return html`<header class="top">
    <${IconButton} icon="panel-left" class="show-sidebar" label=${t("showSidebar")} onClick=${show} />
    <span class="model" title=${state.model?.root ?? ""}>${state.model?.id ?? ""}</span>
    <div class="segments" role="tablist">${tab("chat", "message-square")}${tab("server", "activity")}</div>
    <span class="top-end"><a class="icon-button" href="docs" aria-label=${t("api")} title=${t("api")}><${Icon} name="book-open" /></a>
      <${IconButton} icon="square-pen" class="new-small" label=${t("newChat")} onClick=${newChat} /></span>
  </header>`;
}

function shortcuts(event) {
  const typing = event.target.closest("input, textarea, select");
  const command = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  if (document.querySelector("dialog[open]")) return;
  if (command && event.shiftKey && key === "o") newChat();
  else if (command && key === "k") openSearch();
  else if (command && key === ".") setTab(state.tab === "chat" ? "server" : "chat");
  else if (key === "escape" && isRunning(current())) stop(current());
  else if (!typing && !command && key === "/") document.querySelector(".composer textarea")?.focus();
  else if (!typing && !command && key === "?") state.dialog = "shortcuts";
  else return;
  event.preventDefault();
  changed();
}

function openSearch() {
  state.drawer = true;
  changeSettings({ sidebar: true });
  requestAnimationFrame(() => requestAnimationFrame(() => dispatchEvent(new Event("fdl-search"))));
}

function App() {
  useStore();
  useEffect(() => {
    addEventListener("keydown", shortcuts);
    addEventListener("pagehide", flush);
    addEventListener("hashchange", () => setTab(location.hash === "#server" ? "server" : "chat"));
  }, []);
  const closeDrawer = () => { state.drawer = false; changed(); };
  return html`<div class=${`page ${state.settings.sidebar ? "" : "no-sidebar"} ${state.drawer ? "drawer" : ""}`}>
    <${Sidebar} />
    <div class="veil" onClick=${closeDrawer}></div>
    <div class="content"><${Header} />${state.tab === "chat" ? html`<${Chat} />` : html`<${Server} />`}</div>
    ${state.dialog === "settings" && html`<${Settings} />`}
    ${state.dialog === "shortcuts" && html`<${Shortcuts} />`}
    ${state.keyAsked && html`<${KeyDialog} connect=${connect} />`}
  </div>`;
}

applySettings();
render(html`<${App} />`, document.getElementById("app"));
loadConversations();
connect();
