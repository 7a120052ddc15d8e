// ComfyUI's side: the tab in the sidebar with its badge, the settings, and toasts. ComfyUI imports this file by itself;
// it imports the other `.js` files below this folder as well, which do nothing until they are asked to.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { mount } from "./luna/app.js";
import { link } from "./luna/link.js";
import { sentence } from "./luna/sentences.js";
import { createStore } from "./luna/store.js";
import { followComfyUI } from "./luna/theme.js";

const TAB = "luna";
const TOAST_MS = 8000;
/** Errors of the daemon itself. What only concerns a request is said by the node that made it. */
const TOLD = new Set(["worker_crashed", "out_of_memory", "poison"]);

const SETTINGS = [
  {
    id: "Luna.AllowChanges", name: "Who may warm, unload, pin, evict and drain from the panel", type: "combo",
    options: [
      { text: "Browsers on ComfyUI's own machine", value: "local" },
      { text: "Everybody who can open this ComfyUI", value: "all" },
      { text: "Nobody", value: "off" },
    ],
    defaultValue: "local", category: ["Luna", "Panel", "Changes"],
    tooltip: "The daemon serves every instance on its machine: a change concerns all of them. The server checks it.",
  },
  {
    id: "Luna.ForwardFreeMemory", name: "Unload the daemon's models too when ComfyUI frees memory", type: "boolean",
    defaultValue: false, category: ["Luna", "Daemon", "Free memory"],
    tooltip: "Other instances use the same models; they load again at the next request.",
  },
  {
    id: "Luna.ShowErrors", name: "Show errors of the daemon as toasts", type: "boolean", defaultValue: true,
    category: ["Luna", "Panel", "Errors"],
  },
  {
    id: "Luna.StartFromComfyUI", name: "Start the daemon with ComfyUI, if none runs", type: "combo",
    options: [
      { text: "No", value: "off" },
      { text: "Yes; it ends with ComfyUI", value: "with_comfyui" },
      { text: "Yes; it stays", value: "independent" },
    ],
    defaultValue: "off", category: ["Luna", "Daemon", "Start"],
    tooltip: "From the next start of ComfyUI on. The variable LUNA_START_FROM_COMFYUI goes first.",
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
      if (type === "error" && TOLD.has(data.code) && app.extensionManager.setting.get("Luna.ShowErrors")) {
        toast("error", sentence(type, data));
      }
    },
    lose: () => store.lose(),
  });
}

/** ComfyUI calls this more often than it opens the tab. */
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

/** Ask the daemon to change something, by way of this ComfyUI, which holds the token and knows who may. */
async function call(body) {
  const answer = await api.fetchApi("/luna/call", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  });
  return answer.json();
}

function toast(severity, detail) {
  app.extensionManager?.toast?.add({ severity, summary: "Luna Daemon", detail, life: TOAST_MS });
}

/** What waits or runs; `!` where the daemon was there and is not any more. */
function showBadge({ link: state, info }) {
  const tab = app.extensionManager?.getSidebarTabs?.().find(({ id }) => id === TAB);
  if (!tab) return;
  const busy = state === "live" ? info.in_flight : 0;
  const badge = state === "away" && info ? "!" : busy ? String(busy) : null;
  if (tab.iconBadge !== badge) tab.iconBadge = badge;
}
