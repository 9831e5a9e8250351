// Package intake takes telemetry from edges into a sink and acknowledges what the sink holds durably.
package intake
