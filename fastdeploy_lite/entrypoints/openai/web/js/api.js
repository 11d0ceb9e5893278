// The server's interface. Addresses are relative to the page, so that a proxy's prefix is kept.

const KEY = "fdl.key";
const base = new URL(".", document.baseURI);

export const apiKey = () => {
  try {
    return localStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
};

export function setApiKey(key) {
  try {
    key ? localStorage.setItem(KEY, key) : localStorage.removeItem(KEY);
  } catch {
    // Storage is blocked: the key is asked for again after a reload.
  }
}

/** An answer that is not 200. */
export class ApiError extends Error {
  constructor(status, message, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  const response = await fetch(new URL(path, base), { ...options, headers });
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const text = await response.text().catch(() => "");
  try {
    const body = JSON.parse(text);
    const error = body.error?.message ?? body.error ?? body.detail ?? text;
    return new ApiError(response.status, String(error), body.error?.param ?? null);
  } catch {
    return new ApiError(response.status, text.slice(0, 300) || response.statusText);
  }
}

export const models = async () => (await (await request("v1/models")).json()).data;
export const version = async () => (await request("version")).json();
export const metricsText = async () => (await request("metrics")).text();

/** Whether the engine lives; null when nobody answers. */
export async function healthy() {
  try {
    return (await fetch(new URL("health", base))).ok;
  } catch {
    return null;
  }
}

/** Events of a streamed chat answer. */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const data of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const value = JSON.parse(data);
    if (value.error) throw new ApiError(500, value.error.message ?? String(value.error));
    yield value;
  }
  throw new ApiError(0, "The connection was closed before the answer was complete");
}

/** The data of each event, however the bytes are cut. */
export async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) break;
      const events = (rest + value).split(/\r?\n\r?\n/);
      rest = events.pop();
      for (const event of events) {
        const data = event.split(/\r?\n/).filter((l) => l.startsWith("data:"));
        if (data.length) yield data.map((l) => l.slice(5).replace(/^ /, "")).join("\n").trimEnd();
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
