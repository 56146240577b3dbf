// The admin API from the page's side: calls, errors, streams. The token is kept for the tab only.

const TOKEN = "kvstore-token";

export const token = {
  get: () => sessionStorage.getItem(TOKEN) ?? "",
  set: (text) => sessionStorage.setItem(TOKEN, text),
  forget: () => sessionStorage.removeItem(TOKEN),
};

/** What the API answered instead of doing it. `status` is 0 when nothing answered. */
export class Refused extends Error {
  constructor(status, problem) {
    super([problem.detail || problem.title || `status ${status}`, problem.remedy].filter(Boolean).join(". "));
    this.status = status;
  }
}

/** The JSON of an answer. `writes`: sent twice on the way, it is done once. Throws Refused. */
export async function call(method, path, body, writes = method !== "GET") {
  const answer = await send(path, {
    method,
    headers: {
      ...(body === undefined ? {} : { "Content-Type": "application/json" }),
      ...(writes ? { "Idempotency-Key": random() } : {}),
    },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  return answer.json();
}

export const get = (path) => call("GET", path);
/** A question that is too long for an address. */
export const ask = (path, body) => call("POST", path, body, false);
export const post = (path, body) => call("POST", path, body);

/** The data of each server-sent event, until the stream ends. An EventSource could not send the token. Throws Refused. */
export async function* events(path, signal) {
  const answer = await send(path, { signal, headers: { Accept: "text/event-stream" } });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffered = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (buffered + value).split(/\r?\n\r?\n/);
    buffered = parts.pop();
    for (const part of parts) {
      const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n"));
    }
  }
}

async function send(path, options) {
  const headers = { ...options.headers };
  if (token.get()) headers.Authorization = `Bearer ${token.get()}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, { detail: "the API does not answer" });
  }
  if (answer.ok) return answer;
  throw new Refused(answer.status, await answer.json().catch(() => ({})));
}

function random() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
