// The connection to the daemon: a WebSocket that is opened again until it holds.

const RETRY_MS = [500, 1000, 2000];
/** A status comes each second; after so long without one the connection is dead, whatever the socket says. */
const SILENCE_MS = 6000;

/**
 * Feed a store with the daemon's messages, for as long as the page lives.
 * @param {URL} url http(s); the WebSocket's scheme follows from it
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
