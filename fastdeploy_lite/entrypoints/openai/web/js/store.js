// The state of the page and its copy in the browser. Conversations are in IndexedDB, one entry each;
// the few settings are in localStorage. Where storage is blocked everything lives until the reload.
import { createStore, del, entries, set } from "../vendor/idb-keyval.js";
import { useEffect, useState } from "../vendor/preact-htm.js";
import { setLanguage, t } from "./i18n.js";

const SETTINGS = "fdl.settings";
const SAVE_MS = 800;
const database = (() => {
  try {
    return createStore("fastdeploy_lite", "conversations");
  } catch {
    return null;
  }
})();

export const state = {
  tab: location.hash === "#server" ? "server" : "chat",
  conversations: [], // newest first
  currentId: null,
  running: new Map(), // conversation id -> AbortController
  settings: readSettings(),
  model: null, // the entry of /v1/models
  online: true,
  keyAsked: null, // null, "missing" or "wrong"
  dialog: null, // "settings", "shortcuts"
  drawer: false,
  notice: "",
  loaded: false,
};

function readSettings() {
  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
  } catch {
    // Blocked or broken: start with the defaults.
  }
  return { language: "", theme: "", sidebar: true, system: "", sampling: {}, tools: "", ...stored };
}

export function changeSettings(values) {
  Object.assign(state.settings, values);
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(state.settings));
  } catch {
    // They hold until the reload.
  }
  applySettings();
  changed();
}

export function applySettings() {
  setLanguage(state.settings.language);
  const { theme } = state.settings;
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

// Who shows the state --------------------------------------------------------------------------

const listeners = new Set();
let scheduled = false;

/** Show the state in the next frame. */
export function changed() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    for (const listener of listeners) listener();
  });
}

export function useStore() {
  const [, renew] = useState(0);
  useEffect(() => {
    const listener = () => renew((n) => n + 1);
    listeners.add(listener);
    listener(); // what has changed since the first frame was made
    return () => listeners.delete(listener);
  }, []);
  return state;
}

// Conversations ----------------------------------------------------------------------------------

export const newId = () =>
  crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, "0")).join("");

export const current = () => state.conversations.find((c) => c.id === state.currentId) ?? null;
export const isRunning = (conversation) => !!conversation && state.running.has(conversation.id);

export async function loadConversations() {
  const found = database ? await entries(database).catch(() => []) : [];
  const begun = new Set(state.conversations.map((c) => c.id)); // while the store was read
  const stored = found.map(([, value]) => value).filter((c) => isConversation(c) && !begun.has(c.id));
  state.conversations.push(...stored.map(repaired));
  sortConversations();
  state.loaded = true;
  changed();
}

export const isConversation = (value) =>
  typeof value?.id === "string" && Array.isArray(value.messages)
  && value.messages.every((m) => ["user", "assistant", "tool"].includes(m?.role));

/** An answer that was being written when the page was left is kept as far as it came. */
function repaired(conversation) {
  for (const message of conversation.messages) {
    if (message.state === "running") message.state = "interrupted";
  }
  return conversation;
}

function sortConversations() {
  state.conversations.sort((a, b) => b.updated - a.updated);
}

const timers = new Map();

/** Write a conversation soon; many changes become one write. */
export function save(conversation, now = false) {
  conversation.updated = Date.now();
  const pending = timers.get(conversation.id);
  if (pending && !now) return;
  clearTimeout(pending);
  const write = () => {
    timers.delete(conversation.id);
    if (!state.conversations.includes(conversation)) return; // deleted meanwhile
    if (database) set(conversation.id, conversation, database).catch(storageFailed);
  };
  now ? write() : timers.set(conversation.id, setTimeout(write, SAVE_MS));
}

function storageFailed(error) {
  state.notice = String(error?.message ?? error);
  changed();
}

export function flush() {
  for (const conversation of state.conversations) {
    if (timers.has(conversation.id)) save(conversation, true);
  }
}

export function createConversation() {
  const { system, sampling, tools } = state.settings;
  const now = Date.now();
  const conversation = {
    id: newId(), title: "", created: now, updated: now, system, tools,
    sampling: { ...sampling }, messages: [],
  };
  state.conversations.unshift(conversation);
  state.currentId = conversation.id;
  return conversation;
}

export function openConversation(id) {
  state.currentId = id;
  state.drawer = false;
  state.tab = "chat";
  changed();
}

export function removeConversations(ids) {
  for (const id of ids) {
    state.running.get(id)?.abort();
    if (database) del(id, database).catch(storageFailed);
  }
  state.conversations = state.conversations.filter((c) => !ids.includes(c.id));
  if (ids.includes(state.currentId)) state.currentId = null;
  changed();
}

export function touched(conversation) {
  sortConversations();
  save(conversation, true);
  changed();
}

export function importConversations(text) {
  const data = JSON.parse(text);
  const found = data?.format === "fastdeploy_lite conversations" ? data.conversations : null;
  if (!Array.isArray(found) || !found.every(isConversation)) throw new Error(t("importBad"));
  for (const conversation of found) {
    state.conversations = state.conversations.filter((c) => c.id !== conversation.id);
    state.conversations.push(repaired(conversation));
    if (database) set(conversation.id, conversation, database).catch(storageFailed);
  }
  sortConversations();
  changed();
  return found.length;
}

export const exportConversations = () =>
  JSON.stringify({ format: "fastdeploy_lite conversations", conversations: state.conversations }, null, 1);

export function asMarkdown(conversation) {
  const parts = [`# ${conversation.title || t("untitled")}`];
  if (conversation.system) parts.push(`> ${conversation.system.replace(/\n/g, "\n> ")}`);
  for (const message of conversation.messages) {
    const who = { user: t("you"), assistant: t("model"), tool: t("toolResult", { name: message.name ?? "" }) };
    parts.push(`**${who[message.role]}**`, message.content || "");
    for (const call of message.calls ?? []) parts.push(`\`${call.name}(${call.arguments})\``);
  }
  return `${parts.join("\n\n")}\n`;
}
