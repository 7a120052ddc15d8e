// The WebSocket to the daemon, reopened whenever the connection breaks.

const RETRY_MS = [500, 1000, 2000];
/** A status comes each second; after this long without one the connection counts as dead. */
const SILENCE_MS = 6000;

/**
 * Feed a store with the daemon's messages until the returned function is called.
 * @param {URL} url an http or https address, which becomes ws or wss
 * @param {{receive: (message: object) => void, lose: (why?: string) => void}} store
 * @returns {() => void} ends the connection
 */
export function link(url, store) {
  const place = new URL(url);
  place.protocol = place.protocol === "https:" ? "wss:" : "ws:";
  let socket = null;
  let failures = 0;
  let timer = 0;
  let ended = false;

  function open() {
    socket = new WebSocket(place);
    socket.onopen = () => socket.send(JSON.stringify({ type: "get_status" }));
    socket.onmessage = ({ data }) => {
      failures = 0;
      expect();
      store.receive(JSON.parse(data));
    };
    socket.onclose = again;
    expect();
  }

  function expect() {
    clearTimeout(timer);
    timer = setTimeout(again, SILENCE_MS);
  }

  function again() {
    if (ended) return;
    drop();
    store.lose();
    timer = setTimeout(open, RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)]);
  }

  function drop() {
    clearTimeout(timer);
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close();
  }

  open();
  return () => {
    ended = true;
    drop();
  };
}
