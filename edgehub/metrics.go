package main

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// metrics makes a registry whose values are read at each scrape.
func (a *agent) metrics() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collector{a})
	return r
}

// collector turns the agent's status into metrics.
type collector struct{ a *agent }

// Describe implements prometheus.Collector: what is collected depends on the streams and models there are.
func (collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	emit := func(kind prometheus.ValueType, name, help string, value float64, labels ...string) {
		var names, values []string
		for i := 0; i+1 < len(labels); i += 2 {
			names, values = append(names, labels[i]), append(values, labels[i+1])
		}
		out <- prometheus.MustNewConstMetric(prometheus.NewDesc("longshore_edge_"+name, help, names, nil), kind, value, values...)
	}
	const counter, gauge = prometheus.CounterValue, prometheus.GaugeValue
	s := c.a.status()
	emit(gauge, "link_up", "Whether the link to the cloud hub is up.", truth(s.Link.State == linkUp))
	emit(gauge, "synced", "Whether the hub confirmed in this session that the list held is the newest.", truth(s.List.Synced))
	emit(gauge, "session", "Number of the newest session.", float64(s.Link.Session))
	emit(counter, "link_bytes_total", "Bytes over the link.", float64(s.Link.BytesIn), "direction", "in")
	emit(counter, "link_bytes_total", "Bytes over the link.", float64(s.Link.BytesOut), "direction", "out")
	emit(counter, "link_rejected_total", "Messages of the hub that were not believed or not understood.", float64(s.Link.Rejected))
	emit(gauge, "telemetry_window_bytes", "Bound of telemetry bytes not acknowledged.", float64(s.Link.TelemetryWindow))
	emit(gauge, "telemetry_outstanding_bytes", "Telemetry bytes sent and not acknowledged.", float64(s.Link.TelemetryOutstanding))
	emit(gauge, "pods", "Pods this edge should run.", float64(len(s.Pods)))
	emit(gauge, "disk_free_bytes", "Free bytes of the state folder's file system.", float64(s.Disk.FreeBytes))
	emit(gauge, "outbox_disk_bytes", "Bytes of the outbox on disk.", float64(s.Outbox.DiskBytes))
	emit(gauge, "model_disk_bytes", "Bytes of model files on disk.", float64(s.Disk.ModelBytes))
	for _, o := range s.Outbox.Streams {
		for state, v := range map[string]uint64{"accepted": o.Accepted, "acked": o.Acked, "dropped": o.Dropped, "refused": o.Refused} {
			emit(counter, "outbox_records_total", "Records by what became of them.", float64(v), "stream", o.Stream, "state", state)
		}
		emit(gauge, "outbox_held_records", "Records not known to be in the sink.", float64(o.Held), "stream", o.Stream)
		emit(gauge, "outbox_held_bytes", "Bytes of records not known to be in the sink.", float64(o.HeldBytes), "stream", o.Stream)
		emit(gauge, "outbox_oldest_seconds", "Age of the oldest record held.", float64(o.OldestAgeSeconds), "stream", o.Stream)
	}
	emit(gauge, "devices_connected", "Connections of devices.", float64(s.Devices.Connections))
	emit(counter, "devices_messages_total", "Messages of devices.", float64(s.Devices.MessagesIn), "direction", "in")
	emit(counter, "devices_messages_total", "Messages of devices.", float64(s.Devices.MessagesOut), "direction", "out")
	emit(counter, "devices_dropped_total", "Messages that slow or absent subscribers did not get.", float64(s.Devices.Dropped))
	emit(counter, "devices_refused_total", "Messages refused because their stream or the disk was full.", float64(s.Devices.NotStored))
	for _, m := range c.a.models.Metrics() {
		label := []string{"namespace", m.Namespace, "model", m.Name}
		emit(gauge, "model_ready", "Whether a worker serves the model.", truth(m.Ready), label...)
		emit(counter, "model_inferences_total", "Inferences answered.", float64(m.Inferences), label...)
		emit(counter, "model_errors_total", "Inferences that failed, bad payloads included.", float64(m.Errors), label...)
		emit(counter, "model_restarts_total", "Workers replaced after a failure.", float64(m.Restarts), label...)
		emit(counter, "model_queue_dropped_total", "Device messages a full queue did not take.", float64(m.QueueDrops), label...)
		emit(gauge, "model_queued", "Device messages waiting.", float64(m.Queued), label...)
		emit(gauge, "model_worker_memory_bytes", "Resident memory of the serving worker.", float64(m.WorkerMemory), label...)
	}
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
