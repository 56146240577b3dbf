// The live view: one stream of snapshots, taken up again when it breaks off.

import { useEffect, useRef, useState } from "./vendor/preact.js";
import { Refused, events } from "./api.js";
import { Samples } from "./samples.js";

const SILENCE_SECONDS = 6;
const FIRST_DELAY = 1000;
const LAST_DELAY = 10000;

/** `{snapshot, node, nodeTime, samples, broken}`: `node` is the last that is known, `broken` says why nothing comes. */
export function useLive(signedIn, onDenied) {
  const samples = useRef(new Samples()).current;
  const [state, set] = useState({ snapshot: null, node: null, nodeTime: 0, broken: "" });
  useEffect(() => {
    if (!signedIn) return undefined;
    const ended = new AbortController();
    const take = (snapshot) => {
      const node = snapshot.parts.node;
      if (node) samples.add(snapshot.time, node);
      set((last) => ({ snapshot, broken: "", node: node ?? last.node, nodeTime: node ? snapshot.time : last.nodeTime }));
    };
    follow(ended.signal, take, (broken) => set((last) => ({ ...last, broken })), onDenied);
    return () => ended.abort();
  }, [signedIn]);
  return { ...state, samples };
}

async function follow(signal, take, lost, denied) {
  let delay = FIRST_DELAY;
  while (!signal.aborted) {
    const watch = new Watchdog(SILENCE_SECONDS * 1000);
    try {
      for await (const snapshot of events("v1/events", AbortSignal.any([signal, watch.signal]))) {
        watch.feed();
        delay = FIRST_DELAY;
        take(snapshot);
      }
      lost("The stream ended");
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Refused && error.status === 401) return denied(error);
      lost(error instanceof Refused ? error.message : "The connection to the API broke");
    } finally {
      watch.stop();
    }
    await new Promise((resolve) => setTimeout(resolve, delay));
    delay = Math.min(2 * delay, LAST_DELAY);
  }
}

/** Aborts when nothing came for a while: a connection can be dead without saying so. */
class Watchdog {
  constructor(milliseconds) {
    this.milliseconds = milliseconds;
    this.controller = new AbortController();
    this.signal = this.controller.signal;
    this.feed();
  }

  feed() {
    this.stop();
    this.timer = setTimeout(() => this.controller.abort(), this.milliseconds);
  }

  stop() {
    clearTimeout(this.timer);
  }
}
