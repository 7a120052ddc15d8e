// Numbers as text for people.

const UNITS = ["B", "kB", "MB", "GB", "TB"];

/** Format a size. @param {number|undefined} n bytes @returns {string} such as `1.5 GB`, in powers of 1024 */
export function bytes(n) {
  if (!Number.isFinite(n)) return "–";
  let step = 0;
  for (; Math.abs(n) >= 1000 && step < UNITS.length - 1; step++) n /= 1024;
  return `${n >= 100 || step === 0 ? Math.round(n) : n.toFixed(1)} ${UNITS[step]}`;
}

/** Format a short time. @param {number|undefined} ms milliseconds @returns {string} such as `40 µs`, `0.4 ms`, `350 ms`, `1.2 s` */
export function duration(ms) {
  if (!Number.isFinite(ms)) return "–";
  if (ms >= 60_000) return span(ms / 1000);
  if (ms >= 1000) return `${short(ms / 1000)} s`;
  return ms >= 0.1 || ms === 0 ? `${short(ms)} ms` : `${Math.round(1000 * ms)} µs`;
}

function short(n) {
  return n < 10 ? String(Number(n.toFixed(1))) : String(Math.round(n));
}

/** Format a long time. @param {number|undefined} s seconds @returns {string} the two largest units: `4 s`, `2 min 5 s`, `3 d 4 h` */
export function span(s) {
  if (!Number.isFinite(s)) return "–";
  s = Math.max(0, Math.floor(s));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** Format a count. @param {number|undefined} n @returns {string} with thin spaces between thousands */
export function count(n) {
  return Number.isFinite(n) ? String(Math.round(n)).replace(/\B(?=(\d{3})+$)/g, "\u202f") : "–";
}

/** Format a rate. @param {number|undefined} n per second @returns {string} two digits below ten */
export function rate(n) {
  if (!Number.isFinite(n)) return "–";
  return n < 10 ? String(Number(n.toPrecision(2))) : count(n);
}

/** Format a hit rate. @param {number} hits @param {number} misses @returns {string} hits among all lookups, in percent */
export function share(hits, misses) {
  return hits + misses > 0 ? `${Math.round((100 * hits) / (hits + misses))} %` : "–";
}

/** Format a time of day. @param {Date} moment @returns {string} `14:02:11` */
export function clock(moment) {
  return moment.toTimeString().slice(0, 8);
}

/** Shorten a file's path or name. @param {string} path @returns {string} the last part, without the ending of a weight file */
export function leaf(path) {
  return String(path).split(/[\\/]/).pop().replace(/\.(safetensors|sft|pt|pth|ckpt|bin)$/, "");
}

/** Split a model's key. @param {string} key such as `vae:sdxl_vae:4856a0…` @returns {{kind: string, name: string}} */
export function modelName(key) {
  const [kind, ...rest] = String(key).split(":");
  if (rest.length === 0) return { kind: "", name: kind };
  return { kind: KINDS[kind] ?? kind, name: (rest.length > 1 ? rest.slice(0, -1) : rest).join(":") };
}

/** Names of the kinds of models. */
export const KINDS = { vae: "VAE", clip: "text encoder" };
