// Extension of ComfyUI's window: the tab in the sidebar with a badge, the settings, and toasts. ComfyUI imports every
// `.js` file below this folder by itself; all the others do nothing when imported.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { mount } from "./luna/app.js";
import { link } from "./luna/link.js";
import { sentence } from "./luna/sentences.js";
import { createStore } from "./luna/store.js";
import { followComfyUI } from "./luna/theme.js";

const TAB = "luna";
const TOAST_MS = 8000;
/** Errors of the daemon itself. The node that sent a request shows what concerns that request only. */
const SHOWN = new Set(["worker_crashed", "out_of_memory", "poison"]);

const SETTINGS = [
  {
    id: "Luna.AllowChanges", name: "Who may warm, unload, pin, evict and drain from the panel", type: "combo",
    options: [
      { text: "Browsers on ComfyUI's own machine", value: "local" },
      { text: "Everybody who can open this ComfyUI", value: "all" },
      { text: "Nobody", value: "off" },
    ],
    defaultValue: "local", category: ["Luna", "Panel", "Changes"],
    tooltip: "The daemon serves every ComfyUI on the machine, so a change concerns all of them. The server enforces this.",
  },
  {
    id: "Luna.ForwardFreeMemory", name: "Unload the daemon's models too when ComfyUI frees memory", type: "boolean",
    defaultValue: false, category: ["Luna", "Daemon", "Free memory"],
    tooltip: "Other ComfyUIs share these models. A model is loaded again at the next request for it.",
  },
  {
    id: "Luna.ShowErrors", name: "Show errors of the daemon as toasts", type: "boolean", defaultValue: true,
    category: ["Luna", "Panel", "Errors"],
    tooltip: "A crashed worker or a lack of memory, for example. Errors of a request are shown on the node in any case.",
  },
  {
    id: "Luna.StartFromComfyUI", name: "Start a daemon with ComfyUI if none is running", type: "combo",
    options: [
      { text: "No", value: "off" },
      { text: "Yes, and stop it when ComfyUI ends", value: "with_comfyui" },
      { text: "Yes, and leave it running", value: "independent" },
    ],
    defaultValue: "off", category: ["Luna", "Daemon", "Start"],
    tooltip: "Takes effect when ComfyUI starts. The environment variable LUNA_START_FROM_COMFYUI takes precedence.",
  },
];

const store = createStore();
let panel = null;

app.registerExtension({ name: "Luna.Panel", settings: SETTINGS, setup });

function setup() {
  api.addEventListener("luna.toast", ({ detail }) => toast(detail.severity, detail.detail));
  app.extensionManager?.registerSidebarTab?.({
    id: TAB, icon: "pi pi-moon", title: "Luna", tooltip: "Luna Daemon", type: "custom", render, destroy,
  });
  store.subscribe(showBadge);
  link(new URL(api.apiURL("/luna/ws"), location.href), {
    receive(message) {
      store.receive(message);
      const { type, data } = message;
      if (type === "error" && SHOWN.has(data.code) && app.extensionManager.setting.get("Luna.ShowErrors")) {
        toast("error", sentence(type, data));
      }
    },
    lose: () => store.lose(),
  });
}

/** Show the panel in the tab; ComfyUI calls this more often than the tab is opened. */
function render(container) {
  if (panel?.container === container) return;
  destroy();
  const host = document.createElement("div");
  host.className = "luna-host";
  container.append(host);
  const { root, close } = mount(host.attachShadow({ mode: "open" }), { call, toast, store });
  root.dataset.in = "comfyui";
  const unfollow = followComfyUI(root);
  panel = { container, close: () => (close(), unfollow(), host.remove()) };
}

function destroy() {
  panel?.close();
  panel = null;
}

/** Send a change to the daemon by way of ComfyUI's server, which adds the token and checks who may. */
async function call(body) {
  const answer = await api.fetchApi("/luna/call", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  return answer.json();
}

function toast(severity, detail) {
  app.extensionManager?.toast?.add({ severity, summary: "Luna Daemon", detail, life: TOAST_MS });
}

/** Set the tab's badge: the number of requests in flight, or `!` after the daemon has gone away. */
function showBadge({ link: state, info }) {
  const tab = app.extensionManager?.getSidebarTabs?.().find(({ id }) => id === TAB);
  if (!tab) return;
  const busy = state === "live" ? info.in_flight : 0;
  const badge = state === "away" && info ? "!" : busy ? String(busy) : null;
  if (tab.iconBadge !== badge) tab.iconBadge = badge;
}
